"""Memory near the processors that write it, on machines with several memory nodes (NUMA).

Covers which node a process runs on, as far as its affinity says so, waiting a moment for those that are to write, and
asking the kernel to prefer their nodes for their parts of a mapping that nobody has touched yet. It is a wish: where a
node is full, the kernel takes another, and where the call is forbidden, as in some containers, memory lies as it would
have. On a machine with one node nothing is done at all.
"""

import ctypes
import logging
import mmap
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from holdfast.daemon.core.actions import Allocate

log = logging.getLogger(__name__)

_SYS = Path("/sys/devices/system/node")
_MBIND = {"x86_64": 237, "aarch64": 235}  # no function of libc's, and libnuma is not everywhere
_PREFERRED = 1  # MPOL_PREFERRED of linux/mempolicy.h
_NODE_COUNT_MAX = 1024  # as many as the kernel can be built for
KNOWN_AFTER_S_MAX = 0.3  # the ranks of a node plan together; memory is not kept waiting for one that does not
_BITS = 8 * ctypes.sizeof(ctypes.c_ulong)


@dataclass(frozen=True, slots=True)
class Near:
    """Bytes of an image that are to lie on one memory node."""

    start: int
    size_bytes: int
    node: int


class Topology:
    """Which processors are near which memory, read once."""

    def __init__(self, folder: Path = _SYS) -> None:
        self.cpus: dict[int, frozenset[int]] = {}
        try:
            for entry in folder.glob("node[0-9]*"):
                cpus = _listed((entry / "cpulist").read_text(encoding="ascii"))
                if cpus:  # memory without processors is nobody's own
                    self.cpus[int(entry.name.removeprefix("node"))] = cpus
        except (OSError, ValueError) as error:
            log.debug("memory nodes are not known: %s", error)
            self.cpus = {}

    def node_of(self, pid: int) -> int | None:
        """The node that has all processors on which a process may run; None if there is none, or just one node."""
        if len(self.cpus) < 2 or pid <= 0:  # 0: it is in another namespace of processes
            return None
        try:
            return self.node_with(os.sched_getaffinity(pid))
        except OSError:  # gone
            return None

    def node_with(self, allowed: set[int]) -> int | None:
        """The node that has all of these processors, if one does."""
        found = [node for node, cpus in self.cpus.items() if cpus & allowed]
        return found[0] if len(found) == 1 else None


class Placer:
    """Holds orders for memory back until the ranks that will write it are known. On the loop's thread.

    Attributes:
        waiting: (until when, the order).
    """

    def __init__(
        self,
        topology: Topology,
        writers: Callable[[Allocate], list[tuple[int | None, int, int]]],
        order: Callable[[Allocate, tuple[Near, ...]], None],
    ) -> None:
        """Say whom to ask and to tell.

        Args:
            topology: of this machine.
            writers: (process, first byte, bytes) of each shard in some memory; None while its rank is not known.
            order: has memory made, parts of it near a node.
        """
        self._topology, self._writers, self._order = topology, writers, order
        self.waiting: list[tuple[float, Allocate]] = []

    def take(self, action: Allocate) -> None:
        """Order it now, or once it is known who writes."""
        if len(self._topology.cpus) < 2 or action.layout is None:
            self._order(action, ())
        else:
            self.waiting.append((time.monotonic() + KNOWN_AFTER_S_MAX, action))

    def look(self) -> None:
        """Order what need not wait any more. Once per turn of the loop."""
        if not self.waiting:
            return
        held, self.waiting = self.waiting, []
        for until_s, action in held:
            writers = self._writers(action)
            if any(pid is None for pid, *_ in writers) and time.monotonic() < until_s:
                self.waiting.append((until_s, action))
                continue
            placed = [(start, size, self._topology.node_of(pid or 0)) for pid, start, size in writers]
            self._order(action, tuple(Near(start, size, node) for start, size, node in placed if node is not None))


def prefer(mapping: mmap.mmap, wishes: Sequence[Near]) -> None:
    """Wish where parts of a mapping lie that was not touched yet; it holds for the file behind it, whoever maps it."""
    number = _MBIND.get(platform.machine())
    if number is None or not wishes:
        return
    anchor = ctypes.c_char.from_buffer(mapping)
    first = ctypes.addressof(anchor)
    del anchor  # it would keep the mapping from being closed
    for wish in wishes:
        start, end = _page_after(wish.start), min(_page_after(wish.start + wish.size_bytes), len(mapping))
        if wish.node >= _NODE_COUNT_MAX or start >= end:
            continue
        mask = (ctypes.c_ulong * (_NODE_COUNT_MAX // _BITS))()
        mask[wish.node // _BITS] = 1 << (wish.node % _BITS)
        libc = ctypes.CDLL(None, use_errno=True)
        words = (ctypes.c_long(number), ctypes.c_void_p(first + start), ctypes.c_ulong(end - start))
        if libc.syscall(*words, ctypes.c_int(_PREFERRED), mask, ctypes.c_ulong(_NODE_COUNT_MAX + 1), ctypes.c_uint(0)):
            log.debug("memory lies where it lies: %s", os.strerror(ctypes.get_errno()))
            return


def _page_after(offset: int) -> int:
    """Shards begin anywhere; the page in which one ends and the next one begins is the first one's."""
    return -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE


def _listed(text: str) -> frozenset[int]:
    """Processors of the kernel's notation: 0-3,8 -> 0 1 2 3 8."""
    found: set[int] = set()
    for part in text.strip().split(","):
        if part:
            low, _, high = part.partition("-")
            found |= set(range(int(low), int(high or low) + 1))
    return frozenset(found)
