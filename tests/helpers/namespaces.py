"""Two networks of this machine as two nodes, and a cable between them that can be cut (as root)."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator

INTERFACE, NOBODY = "ib0", "02:00:00:00:00:99"


class Cable:
    """Two network namespaces whose interfaces `ib0` are connected."""

    def __init__(self) -> None:
        self.names = [f"sg{os.getpid()}-{rank}" for rank in range(2)]
        self.prefixes = [["ip", "netns", "exec", name] for name in self.names]

    def up(self) -> None:
        for name in self.names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        one, other = self.names
        peer = ("peer", "name", INTERFACE, "netns", other)
        _ip("-n", one, "link", "add", INTERFACE, "type", "veth", *peer)
        for rank, name in enumerate(self.names, 1):
            _ip("-n", name, "addr", "add", f"10.77.0.{rank}/24", "dev", INTERFACE)
            _ip("-n", name, "link", "set", INTERFACE, "up")

    def cut(self) -> None:
        """Frames go to an address that nobody has: silence, and no error."""
        for other, name in zip((2, 1), self.names, strict=True):
            neighbour = (f"10.77.0.{other}", "lladdr", NOBODY, "nud", "permanent")
            _ip("-n", name, "neigh", "replace", *neighbour, "dev", INTERFACE)

    def down(self) -> None:
        for name in self.names:
            with contextlib.suppress(subprocess.SubprocessError):
                _ip("netns", "del", name)


def is_possible() -> bool:
    """Whether this user may make network namespaces here."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    return subprocess.run(["unshare", "--net", "true"], check=False).returncode == 0


@contextlib.contextmanager
def cable() -> Iterator[Cable]:
    made = Cable()
    try:
        made.up()
        yield made
    finally:
        made.down()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)
