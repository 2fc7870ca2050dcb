"""Redacts secrets: keys and tokens, the names of users, the names of hosts.

docs/bundles.md has the rules. Text that may change is redacted. A secret in text that may not
change (the configuration, specifications, the workflow) makes `secrets.check_secrets` refuse.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from detect_secrets.plugins.aws import AWSKeyDetector
from detect_secrets.plugins.azure_storage_key import AzureStorageKeyDetector
from detect_secrets.plugins.discord import DiscordBotTokenDetector
from detect_secrets.plugins.github_token import GitHubTokenDetector
from detect_secrets.plugins.gitlab_token import GitLabTokenDetector
from detect_secrets.plugins.openai import OpenAIDetector
from detect_secrets.plugins.pypi_token import PypiTokenDetector
from detect_secrets.plugins.sendgrid import SendGridDetector
from detect_secrets.plugins.slack import SlackDetector
from detect_secrets.plugins.square_oauth import SquareOAuthDetector
from detect_secrets.plugins.stripe import StripeDetector

_DETECTORS = (
    *(AWSKeyDetector, AzureStorageKeyDetector, DiscordBotTokenDetector, GitHubTokenDetector),
    *(GitLabTokenDetector, OpenAIDetector, PypiTokenDetector),
    *(SendGridDetector, SlackDetector, SquareOAuthDetector, StripeDetector),
)
"""Detectors of detect-secrets that find nothing in ordinary logs and numbers."""
TOKENS = {
    "a bearer token": r"(?i:\bbearer )[A-Za-z0-9._~+/=-]{16,}",
    "basic credentials": r"(?i:\bauthorization[\"']?\s*[:=]\s*[\"']?basic )[A-Za-z0-9+/=]{6,}",
    "a password in a URL": r"(?<=://)[^\s/:@]*:[^\s/@]+(?=@)",
    "a Hugging Face token": r"hf_(?<=\bhf_)[A-Za-z0-9]{16,}",
    "an API key": r"sk-(?<=\bsk-)[A-Za-z0-9_-]{20,}",
    "a GitHub token": r"g(?<=\bg)(?:h[pousr]_[A-Za-z0-9]{30,}|ithub_pat_\w{30,})",
    "a GitLab token": r"glpat-(?<=\bglpat-)[\w-]{20,}",
    "an AWS key": r"AKIA(?<=\bAKIA)[0-9A-Z]{16}\b",
    "a JSON Web Token": r"eyJ(?<=\beyJ)[\w=-]{8,}\.[\w=-]{4,}(?:\.[\w.+/=-]*)?",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"(?s:.*?)(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    **{
        f"{detector.secret_type} ({number})": pattern.pattern
        for detector in _DETECTORS
        for number, pattern in enumerate(detector.denylist, 1)
    },
}
"""Kinds of secrets that have a pattern of their own.

A pattern that begins with plain text is searched several times as fast as one that begins with
`\\b`, so the word boundary is checked afterwards. One pattern after another is faster than one
pattern of all alternatives. The first three come first, because they include others.
"""

# The prefix is bounded: without a bound, the time would grow with the square of a line's length.
_SECRET_KEY = (
    r"(?:[\w-]{0,40}[_-])?"
    r"(?:(?:api|access|account|secret|private)[_-]?key|token|secret|credentials?|passw(?:or)?d|pwd)"
)
_ASSIGNMENT = re.compile(
    rf"(?i)\b({_SECRET_KEY}[\"']?(?:\s*[=:]\s*|\s+)[\"']?)"
    r"(?=[\w.+/=-]*\d)(?=[\w.+/=-]*[a-z])[\w.+/=-]{16,}"
)
_PASSWORD = re.compile(
    r"(?i)\b((?:[\w-]{0,40}[_-])?(?:passw(?:or)?d|pwd)[\"']?\s*[=:]\s*[\"']?)(?!\[)[^\s\"',;]{3,}"
)
"""A password can be short, and a sentence seldom has a colon after the word."""
_SECRET_NAME = re.compile(rf"(?i)(?:--)?{_SECRET_KEY}")
_TOKENS = {kind: re.compile(pattern) for kind, pattern in TOKENS.items()}
_HOME = re.compile(r"(/(?:home|Users)/)(?!user(?![\w.-]))([^\s/\"'`<>:,;()\[\]{}*]+)")
_PSEUDONYM = re.compile(r"node-\d+")
_MAX_RANGE = 100_000
_MIN_LETTERS = 4
"""Shortest name of a host that is replaced in running text: a shorter one would hit other words."""

HOST_KEYS = frozenset(
    {
        *("node", "host", "SLURM_JOB_NODELIST"),
        *("NodeList", "BatchHost", "ReqNodeList", "ExcNodeList", "SchedNodeList", "AllocNode:Sid"),
    }
)
"""Keys in records and in Slurm's output whose values are hosts: one name, or `prefix[1-3,5]`."""
USER_KEYS = frozenset({"UserId", "User"})


@dataclass(frozen=True)
class Redactor:
    """Replaces the names of one study: `hosts` by their pseudonyms, `users` by `user`."""

    hosts: Mapping[str, str]
    users: frozenset[str]

    @classmethod
    def from_documents(cls, documents: Iterable[Any], users: Iterable[str] = ()) -> Redactor:
        """A redactor for the names in JSON documents: records of trials, Slurm's records of jobs.

        A host's pseudonym is `node-<n>`, in the order of the names. A study that was unpacked from
        a bundle contains pseudonyms already; these stay.
        """
        hosts: set[str] = set()
        found = set(users)
        for key, text in (pair for document in documents for pair in _iterate_texts(document)):
            if key in HOST_KEYS:
                hosts |= _parse_hosts(text)
            elif key in USER_KEYS:
                found.add(text.partition("(")[0])
        return cls(_make_pseudonyms(hosts), frozenset(found - {"", "root", "user"}))

    def redact_text(self, text: str) -> str:
        """`text` without tokens, names of users in paths, and hosts."""
        for kind, pattern in _TOKENS.items():
            text = pattern.sub(f"[{kind}]", text)
        text = _ASSIGNMENT.sub(r"\1[a secret]", text)
        text = _PASSWORD.sub(r"\1[a secret]", text)
        text = _HOME.sub(r"\1user", text)
        if self.users:
            text = self._user_pattern.sub("user", text)
        if not self.hosts:
            return text
        text = self._element_pattern.sub(
            lambda match: ", ".join(self.hosts[name] for name in match[0].split(", ")), text
        )
        return self._host_pattern.sub(lambda match: self.hosts[match[0]], text)

    def redact_data(self, data: Any, key: str | None = None) -> Any:
        """JSON data with all strings redacted; under a host's key, names of any length.

        A `spec` stays unchanged, because digests identify it.
        """
        if isinstance(data, Mapping):
            return {
                name: value if name == "spec" else self.redact_data(value, name)
                for name, value in data.items()
            }
        if isinstance(data, list):
            return [self.redact_data(item, key) for item in data]
        if not isinstance(data, str) or not data:
            return data
        if key is not None and _SECRET_NAME.fullmatch(key):
            return "[a secret]"
        if key in HOST_KEYS:
            names = _expand_ranges(data)
            return _NAME.sub(lambda match: self.hosts.get(match[0], match[0]), names)
        return "user" if data in self.users else self.redact_text(data)

    def find_hosts(self, text: str) -> set[str]:
        """The hosts in running text."""
        return set(self._host_pattern.findall(text)) if self.hosts else set()

    @cached_property
    def _host_pattern(self) -> re.Pattern[str]:
        long = [host for host in self.hosts if len(host) >= _MIN_LETTERS]
        return _compile_words(long, r"(?<![\w.-])", r"(?![\w-])")

    @cached_property
    def _element_pattern(self) -> re.Pattern[str]:
        """Hosts of any length that are the whole text of an HTML element: one, or a list."""
        one = _compile_words(self.hosts, "", "").pattern
        return re.compile(f"(?<=>){one}(?:, {one})*(?=<)")

    @cached_property
    def _user_pattern(self) -> re.Pattern[str]:
        return _compile_words(
            self.users,
            r"(?:(?<=/)|(?<=UserId=)|(?<![\w@.-])(?=\S{1,64}[@(]))",
            r"(?=[/@(\s\"':,;]|$)",
        )


def find_secrets(text: str) -> Iterator[str]:
    """The kinds of secrets in `text`; the secrets themselves are not repeated."""
    yield from (kind for kind, pattern in _TOKENS.items() if pattern.search(text))
    if _HOME.search(text):
        yield "a user name in a path"


def find_secrets_in_data(data: Any) -> Iterator[str]:
    """The kinds of secrets in JSON data, including any value under a key such as `api_key`."""
    for key, text in _iterate_texts(data):
        if key is not None and _SECRET_NAME.fullmatch(key) and text != "[a secret]":
            yield f"a value of `{key}`"
        yield from find_secrets(text)


_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


def _compile_words(words: Iterable[str], before: str, after: str) -> re.Pattern[str]:
    """Any of `words` between two patterns; none if there are no words."""
    longest_first = sorted(words, key=lambda word: (-len(word), word))
    return re.compile(f"{before}(?:{'|'.join(map(re.escape, longest_first)) or '(?!)'}){after}")


def _iterate_texts(data: Any, key: str | None = None) -> Iterator[tuple[str | None, str]]:
    """Each string in JSON data, with the nearest key above it."""
    if isinstance(data, Mapping):
        for name, value in data.items():
            yield from _iterate_texts(value, str(name))
    elif isinstance(data, list | tuple):
        for item in data:
            yield from _iterate_texts(item, key)
    elif isinstance(data, str):
        yield key, data


def _parse_hosts(text: str) -> set[str]:
    """The hosts of one entry, each with and without its domain."""
    names = {match[0] for match in _NAME.finditer(_expand_ranges(text.partition(":")[0]))}
    known = {name for name in names if name not in ("localhost", "None", "null", "N/A")}
    return known | {name.partition(".")[0] for name in known if not name[0].isdigit()}


def _expand_ranges(text: str) -> str:
    """`bora[001-003,7]` as `bora001,bora002,bora003,bora7`; other text unchanged."""

    def expand(match: re.Match[str]) -> str:
        names = []
        for part in match[2].split(","):
            first, _, last = part.partition("-")
            if int(last or first) - int(first) > _MAX_RANGE:
                return match[0]
            for number in range(int(first), int(last or first) + 1):
                names.append(f"{match[1]}{number:0{len(first)}}{match[3]}")
        return ",".join(names)

    return re.sub(r"([\w.-]+)\[(\d[\d,-]*)\]([\w.-]*)", expand, text)


def _make_pseudonyms(hosts: Iterable[str]) -> dict[str, str]:
    """A pseudonym for each host; names with and without a domain share one."""
    machines: dict[str, str] = {}
    taken = {host for host in hosts if _PSEUDONYM.fullmatch(host)}
    numbers = iter(range(1, 2**31))
    for host in sorted(hosts):
        short = host if host[0].isdigit() else host.partition(".")[0]
        if short in taken:
            machines[short] = short
        elif short not in machines:
            candidates = (f"node-{number}" for number in numbers)
            machines[short] = next(name for name in candidates if name not in taken)
        machines[host] = machines[short]
    return machines
