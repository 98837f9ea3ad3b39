"""What a process holds, by /proc, and who grew: named by kind (keeper, worker, rank) and process.

Covers counting and comparing. Who should be there at all is told by whoever started them.
"""

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from local_cluster import alive, descriptors, resident_bytes

FILES_SLACK = 2  # descriptors but sockets: a slot that comes or goes meanwhile is two
SOCKETS_SLACK = 12  # connections that are just being replaced by others
THREADS_SLACK = 1
OWN_SLACK_BYTES = 24 << 20  # of memory beside the arena: allocator caches
KINDS = {"holdfast.daemon.keeper": "keeper", "holdfast.daemon.shell.worker": "worker", "multiprocessing": "rank"}


@dataclass(frozen=True)
class Held:
    """What one process holds.

    Attributes:
        files: descriptors but sockets, by name without numbers.
        own_bytes: resident memory beside files and shared memory.
    """

    pid: int
    files: Counter[str]
    sockets: int
    threads: int
    own_bytes: int


def held_by(pid: int) -> Held:
    """Look. Raises OSError if the process is gone."""
    names = [re.sub(r"\d+", "#", name) for name in descriptors(pid)]
    files = Counter(name for name in names if not name.startswith("socket:"))
    threads = len(list(Path(f"/proc/{pid}/task").iterdir()))
    return Held(pid, files, len(names) - files.total(), threads, resident_bytes(pid))


def growth(who: str, before: Held, after: Held) -> list[str]:
    """What a process, or its successor, holds beyond what it held before; empty if all is well."""
    found = []
    if after.files.total() > before.files.total() + FILES_SLACK:
        more = ", ".join(f"{count} x {name}" for name, count in (after.files - before.files).items())
        found.append(f"descriptors from {before.files.total()} to {after.files.total()}, new: {more}")
    if after.sockets > before.sockets + SOCKETS_SLACK:
        found.append(f"sockets from {before.sockets} to {after.sockets}")
    if after.threads > before.threads + THREADS_SLACK:
        found.append(f"threads from {before.threads} to {after.threads}: {', '.join(_thread_names(after.pid))}")
    if after.own_bytes > before.own_bytes + OWN_SLACK_BYTES:
        found.append(f"own memory from {before.own_bytes} to {after.own_bytes} bytes")
    return [f"{who} (process {after.pid}) grew: {text}" for text in found]


def strangers(known: set[int], *, folder: Path, everywhere: bool) -> list[str]:
    """Processes that should not be: all but `known` in a process namespace of our own (`everywhere`), else those that
    name our folder. One that ended and that nobody waited for counts in the former."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or (pid := int(entry.name)) in known or pid == os.getpid():
            continue
        words = _words(pid)
        if everywhere or (alive(pid) and any(word.startswith(str(folder)) for word in words)):
            state = "" if alive(pid) else ", ended and not waited for"
            found.append(f"{kind_of(words)} (process {pid}{state}) is left: {' '.join(words)[:200]}")
    return found


def kind_of(words: list[str]) -> str:
    """The kind of a process, from its command line."""
    return next((kind for mark, kind in KINDS.items() if any(mark in word for word in words)), "process")


def _words(pid: int) -> list[str]:
    try:
        return [os.fsdecode(word) for word in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") if word]
    except OSError:
        return []


def _thread_names(pid: int) -> list[str]:
    try:
        return [(entry / "comm").read_text().strip() for entry in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return []
