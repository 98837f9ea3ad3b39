"""The bytes of the arena: making, populating, mapping and freeing slot memory.

Covers memory of slots by name. Who may have how much is the core's business; who holds descriptors over our death is
the keeper's. Mappings stay valid while anybody still uses a view of them, also after `free`.
"""

import contextlib
import mmap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from holdfast.daemon.core.memory import Memory, Sizes
from holdfast.daemon.shell.keeping import KeeperLink, make_sealed
from holdfast.daemon.shell.numa import Near, prefer

_PART_BYTES = 256 << 20  # of a populating thread at a time; a multiple of every huge page size below 1 GiB
_MADV_POPULATE_WRITE = 23  # Linux 5.14; not named by the mmap module of Python 3.11


@dataclass(frozen=True, slots=True)
class SlotMemory:
    """The mapped memory of one slot.

    Attributes:
        data: the node's image, data_bytes long, writable.
        parity: the node's parity chunks, parity_bytes long, writable.
        digests: the digest table, uint64, shape (digest_count,).
        data_fd: descriptor of the image, owned by the keeper's link; -1 if the node has no image.
    """

    data: memoryview
    parity: memoryview
    digests: npt.NDArray[np.uint64]
    data_fd: int


class ArenaMemory:
    """All slot memory of this worker."""

    def __init__(self, link: KeeperLink, *, threads: int = 1) -> None:
        self._link, self._threads = link, threads  # that many populate one slot's memory: the kernel zeroes every page
        self._slots: dict[Memory, SlotMemory] = {}
        self.wishes: dict[Memory, tuple[Near, ...]] = {}  # where memory that is made next had better lie

    def get(self, memory: Memory) -> SlotMemory | None:
        """The mapped memory, None if it was freed."""
        return self._slots.get(memory)

    def make(self, memory: Memory, sizes: Sizes) -> None:
        """Make, populate and map a slot. Raises OSError if the kernel has no memory; nothing is left behind then."""
        made: list[str] = []
        wishes = self.wishes.pop(memory, ())
        try:
            for part, size_bytes in (("data", sizes.data_bytes), ("guard", sizes.guard_bytes)):
                if size_bytes == 0:
                    continue
                name = f"{memory}/{part}"
                self._link.hold(name, make_sealed(f"holdfast-{part}", size_bytes))
                made.append(name)
                with mmap.mmap(self._link.held[name], size_bytes) as mapping:
                    prefer(mapping, wishes if part == "data" else ())
                    _populate(mapping, self._threads)
        except OSError:
            for name in made:
                self._link.drop(name)
            raise
        self.map(memory, sizes)

    def map(self, memory: Memory, sizes: Sizes) -> None:
        """Map memory that is held already (after a restart, or just made)."""
        data_fd = self._link.held.get(f"{memory}/data", -1)
        guard_fd = self._link.held.get(f"{memory}/guard", -1)
        data = _mapped(data_fd, sizes.data_bytes)
        guard = _mapped(guard_fd, sizes.guard_bytes)
        self._slots[memory] = SlotMemory(
            data=data,
            parity=guard[: sizes.parity_bytes],
            digests=np.frombuffer(guard[sizes.parity_bytes :], dtype="<u8"),
            data_fd=data_fd,
        )

    def is_held(self, memory: Memory, sizes: Sizes) -> bool:
        """Whether the keeper still has everything of a slot."""
        held = self._link.held
        return (sizes.data_bytes == 0 or f"{memory}/data" in held) and (
            sizes.guard_bytes == 0 or f"{memory}/guard" in held
        )

    def free(self, memory: Memory) -> None:
        """Let a slot's memory go. Pages return to the machine when the last view and the last trainer let go too."""
        self._slots.pop(memory, None)
        for part in ("data", "guard"):
            self._link.drop(f"{memory}/{part}")

    def drop_strays(self) -> None:
        """Let go what the keeper holds and no slot uses."""
        used = {f"{memory}/{part}" for memory in self._slots for part in ("data", "guard")}
        for name in self._link.held:
            if "/" in name and name not in used:
                self._link.drop(name)

    def drop_up_to(self, generation: int) -> None:
        """Let go all memory of generations up to this one: of an epoch that is over, whose threads have ended."""
        for memory in [memory for memory in self._slots if memory.generation <= generation]:
            self.free(memory)
        for name in self._link.held:
            parts = name.rsplit("/", 2)
            if len(parts) == 3 and int(parts[1]) <= generation:
                self._link.drop(name)


def _populate(mapping: mmap.mmap, threads: int) -> None:
    with contextlib.suppress(OSError):  # a kernel without huge pages for shared memory: 4 KiB pages work as well
        mapping.madvise(mmap.MADV_HUGEPAGE)
    parts = [(start, min(_PART_BYTES, len(mapping) - start)) for start in range(0, len(mapping), _PART_BYTES)]
    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="populate") as pool:
        for _ in pool.map(lambda part: mapping.madvise(_MADV_POPULATE_WRITE, *part), parts):
            pass  # an error of any part is raised here


def _mapped(descriptor: int, size_bytes: int) -> memoryview:
    if descriptor < 0 or size_bytes == 0:
        return memoryview(b"")
    return memoryview(mmap.mmap(descriptor, size_bytes))
