"""Processes that this command started, found again by what stands on their command line.

Covers looking and killing through /proc. Whatever the command starts has a path inside its own folder among its
arguments, so the folder's name finds every process of it: also one whose parent died, or that a worker brought back.
"""

import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

END_S = 10.0  # a killed process is gone within milliseconds; longer means that it hangs in the kernel
_LOOK_S = 0.02
_KEEPER = "holdfast.daemon.keeper"
_ENVIRONMENT_BYTES_MAX = 2 << 20  # the kernel's own limit for arguments and environment together
_ARGUMENTS_BYTES_MAX = 64 << 10  # of one command line that are looked at; ours are shorter than 4 KiB


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for doesn't."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in {"Z", "X"}


def children(pid: int) -> list[int]:
    """The living child processes of a process; empty if it is gone."""
    try:
        listed = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    except OSError:
        return []
    return [child for child in map(int, listed.split()) if alive(child)]


def arguments(pid: int) -> list[str]:
    """A process's command line; empty if it is gone."""
    try:
        with Path(f"/proc/{pid}/cmdline").open("rb") as stream:
            return [os.fsdecode(word) for word in stream.read(_ARGUMENTS_BYTES_MAX).split(b"\0")]
    except OSError:
        return []


def environment(pid: int) -> dict[str, str]:
    """The environment that a process was started with; empty if it is gone or somebody else's."""
    try:
        with Path(f"/proc/{pid}/environ").open("rb") as stream:
            words = stream.read(_ENVIRONMENT_BYTES_MAX).split(b"\0")
    except OSError:
        return {}
    return dict(os.fsdecode(word).split("=", 1) for word in words if b"=" in word)


def using(path: Path) -> list[int]:
    """Other living processes that have `path`, or something inside it, among their arguments."""
    inside = f"{path}/"
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            words = arguments(int(entry.name))
            if any(word == str(path) or word.startswith(inside) for word in words) and alive(int(entry.name)):
                found.append(int(entry.name))
    return sorted(found)


def kill(pids: Iterable[int]) -> None:
    """SIGKILL to each; one that is gone already is passed over."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def kill_all_using(path: Path) -> list[int]:
    """SIGKILL to every process that uses a path, again and again until none is left: they bring each other back.

    Returns:
        The processes that were still there after `END_S`; empty if all is well.
    """
    deadline_s = time.monotonic() + END_S
    while left := using(path):
        # A worker brings its keeper back at once, a keeper its worker only after a pause: so keepers go last.
        kill(sorted(left, key=lambda pid: _KEEPER in arguments(pid)))
        if time.monotonic() > deadline_s:
            return left
        time.sleep(_LOOK_S)
    return []
