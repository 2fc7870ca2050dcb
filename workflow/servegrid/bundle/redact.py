"""What must not leave the site: keys and tokens, the users' names, the names of hosts.

docs/bundles.md tells the rule. Where text may change it is redacted; where it may not (the
configuration, specifications, sources) a bundle with something in it is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

TOKENS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{16,}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})",
    "a GitLab token": r"\bglpat-[\w-]{20,}",
    "an AWS key": r"\bAKIA[0-9A-Z]{16}\b",
    "a bearer token": r"(?i:\bbearer )[A-Za-z0-9._~+/=-]{16,}",
    "a password in a URL": r"(?<=://)[^\s/:@]+:[^\s/@]+(?=@)",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"(?s:.*?)(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
}
"""Shapes that nothing else has."""

_SECRET_KEY = r"(?:[\w-]*[_-])?(?:api[_-]?key|token|secret|password)"
_ASSIGNED = re.compile(
    rf"(?i)\b({_SECRET_KEY}[\"']?(?:\s*[=:]\s*|\s+)[\"']?)"
    r"(?=[\w.+/=-]*\d)(?=[\w.+/=-]*[a-z])[\w.+/=-]{16,}"
)
_NAMED_SECRET = re.compile(rf"(?i)(?:--)?{_SECRET_KEY}")
_TOKENS = re.compile("|".join(f"(?P<k{n}>{shape})" for n, shape in enumerate(TOKENS.values())))
_HOME = re.compile(r"(/(?:home|Users)/)(?!user(?![\w.-]))([^\s/\"'`<>:,;()\[\]{}*]+)")
_PSEUDONYM = re.compile(r"node-\d+")
_LEAST_LETTERS = 4
"""Of a host's name that is looked for in running text: a shorter one would hit other words."""

HOST_KEYS = frozenset(
    {
        *("node", "host", "SLURM_JOB_NODELIST"),
        *("NodeList", "BatchHost", "ReqNodeList", "ExcNodeList", "SchedNodeList", "AllocNode:Sid"),
    }
)
"""Keys of records and of Slurm under which hosts stand, as one name or as `prefix[1-3,5]`."""
USER_KEYS = frozenset({"UserId", "User"})


@dataclass(frozen=True)
class Redactor:
    """The names of one study: `hosts` with their pseudonyms, and its users."""

    hosts: Mapping[str, str]
    users: frozenset[str]

    @classmethod
    def of(cls, documents: Iterable[Any], users: Iterable[str] = ()) -> Redactor:
        """The names that JSON documents hold: records of cells, Slurm's records of jobs.

        A host's pseudonym is `node-<n>`, by the order of the names; those that are pseudonyms
        already, in a study that was opened from a bundle, stay.
        """
        hosts: set[str] = set()
        found = set(users)
        for key, text in (pair for each in documents for pair in _texts(each)):
            if key in HOST_KEYS:
                hosts |= _hosts(text)
            elif key in USER_KEYS:
                found.add(text.partition("(")[0])
        return cls(_pseudonyms(hosts), frozenset(found - {"", "root", "user"}))

    def text(self, text: str) -> str:
        """`text` without tokens, users' names in paths, and hosts."""
        text = _TOKENS.sub(lambda hit: f"[{_kind(hit)}]", text)
        text = _ASSIGNED.sub(r"\1[a secret]", text)
        text = _HOME.sub(r"\1user", text)
        if self.users:
            text = self._users.sub("user", text)
        if not self.hosts:
            return text
        text = self._whole_hosts.sub(lambda hit: self.hosts[hit[0]], text)
        return self._hosts.sub(lambda hit: self.hosts[hit[0]], text)

    def data(self, data: Any, key: str | None = None) -> Any:
        """JSON data, all of its strings redacted; those under a host's key whatever their length.

        A `spec` stays: digests are of it.
        """
        if isinstance(data, Mapping):
            return {
                name: value if name == "spec" else self.data(value, name)
                for name, value in data.items()
            }
        if isinstance(data, list):
            return [self.data(each, key) for each in data]
        if not isinstance(data, str) or not data:
            return data
        if key is not None and _NAMED_SECRET.fullmatch(key):
            return "[a secret]"
        if key in HOST_KEYS:
            return _NAME.sub(lambda hit: self.hosts.get(hit[0], hit[0]), _spelled_out(data))
        return "user" if data in self.users else self.text(data)

    @cached_property
    def _hosts(self) -> re.Pattern[str]:
        long = [host for host in self.hosts if len(host) >= _LEAST_LETTERS]
        return _one_of(long, r"(?<![\w.-])", r"(?![\w-])")

    @cached_property
    def _whole_hosts(self) -> re.Pattern[str]:
        """A host of any length that is all of an element of a page."""
        return _one_of(self.hosts, "(?<=>)", "(?=<)")

    @cached_property
    def _users(self) -> re.Pattern[str]:
        return _one_of(
            self.users, r"(?:(?<=/)|(?<=UserId=)|(?<![\w@.-])(?=\S+[@(]))", r"(?=[/@(\s\"':,;]|$)"
        )

    def hosts_in(self, text: str) -> set[str]:
        """The hosts that running text names."""
        return set(self._hosts.findall(text)) if self.hosts else set()


def secrets_in(text: str) -> Iterator[str]:
    """What `text` holds that must not leave the site, told without repeating it."""
    kinds = dict.fromkeys(_kind(hit) for hit in _TOKENS.finditer(text))
    yield from kinds
    if _HOME.search(text):
        yield "a user's name in a path"


def secrets_in_data(data: Any) -> Iterator[str]:
    """The same of JSON data, and any value under a key that is named like one."""
    for key, text in _texts(data):
        if key is not None and _NAMED_SECRET.fullmatch(key) and text != "[a secret]":
            yield f"a value of `{key}`"
        yield from secrets_in(text)


_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


def _kind(hit: re.Match[str]) -> str:
    assert hit.lastgroup is not None
    return list(TOKENS)[int(hit.lastgroup[1:])]


def _one_of(words: Iterable[str], before: str, after: str) -> re.Pattern[str]:
    longest_first = sorted(words, key=lambda word: (-len(word), word))
    return re.compile(f"{before}(?:{'|'.join(map(re.escape, longest_first)) or '(?!)'}){after}")


def _texts(data: Any, key: str | None = None) -> Iterator[tuple[str | None, str]]:
    """Each string in JSON data, with the key that it stands under."""
    if isinstance(data, Mapping):
        for name, value in data.items():
            yield from _texts(value, str(name))
    elif isinstance(data, list | tuple):
        for each in data:
            yield from _texts(each, key)
    elif isinstance(data, str):
        yield key, data


def _hosts(text: str) -> set[str]:
    """All names of one host entry, each with its domain and without."""
    names = {hit[0] for hit in _NAME.finditer(_spelled_out(text.partition(":")[0]))}
    known = {name for name in names if name not in ("localhost", "None", "null", "N/A")}
    return known | {name.partition(".")[0] for name in known if not name[0].isdigit()}


def _spelled_out(text: str) -> str:
    """`bora[001-003,7]` as `bora001,bora002,bora003,bora7`; anything else as it is."""

    def each(hit: re.Match[str]) -> str:
        names = []
        for part in hit[2].split(","):
            first, _, last = part.partition("-")
            for number in range(int(first), int(last or first) + 1):
                names.append(f"{hit[1]}{number:0{len(first)}}{hit[3]}")
        return ",".join(names)

    return re.sub(r"([\w.-]+)\[(\d[\d,-]*)\]([\w.-]*)", each, text)


def _pseudonyms(hosts: Iterable[str]) -> dict[str, str]:
    """A pseudonym for each host; a name with its domain has that of the name without."""
    machines: dict[str, str] = {}
    taken = {host for host in hosts if _PSEUDONYM.fullmatch(host)}
    numbers = iter(range(1, 2**31))
    for host in sorted(hosts):
        short = host if host[0].isdigit() else host.partition(".")[0]
        if short in taken:
            machines[short] = short
        elif short not in machines:
            free = (f"node-{number}" for number in numbers)
            machines[short] = next(name for name in free if name not in taken)
        machines[host] = machines[short]
    return machines
