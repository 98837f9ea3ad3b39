"""Slot memory: made, mapped again by a successor, freed; and nothing left behind when the kernel refuses."""

import pytest
from holdfast.daemon.core.memory import Memory, Sizes
from holdfast.daemon.shell.arena import ArenaMemory
from holdfast.daemon.shell.keeping import KeeperLink

MEMORY = Memory("gpt", 0, 1)
SIZES = Sizes(data_bytes=1 << 16, parity_bytes=1 << 16, digest_count=3)


def test_a_successor_finds_the_same_bytes() -> None:
    link = KeeperLink(None, [])
    arena = ArenaMemory(link)
    arena.make(MEMORY, SIZES)
    made = arena.get(MEMORY)
    assert made is not None
    made.data[:5] = b"bytes"
    made.parity[:6] = b"parity"
    made.digests[:] = [1, 2, 1 << 63]
    successor = ArenaMemory(link)
    assert successor.is_held(MEMORY, SIZES)
    successor.map(MEMORY, SIZES)
    found = successor.get(MEMORY)
    assert found is not None
    assert (bytes(found.data[:5]), bytes(found.parity[:6])) == (b"bytes", b"parity")
    assert list(found.digests) == [1, 2, 1 << 63]
    assert (len(found.data), len(found.parity)) == (SIZES.data_bytes, SIZES.parity_bytes)
    arena.free(MEMORY)
    assert arena.get(MEMORY) is None
    assert link.held == {}


def test_a_node_without_an_image_has_parity_only() -> None:
    link = KeeperLink(None, [])
    arena = ArenaMemory(link)
    arena.make(MEMORY, Sizes(data_bytes=0, parity_bytes=4096, digest_count=1))
    made = arena.get(MEMORY)
    assert made is not None
    assert (len(made.data), len(made.parity), made.data_fd) == (0, 4096, -1)
    arena.free(MEMORY)


def test_a_refusal_of_the_kernel_leaves_nothing_behind() -> None:
    link = KeeperLink(None, [])
    arena = ArenaMemory(link)
    with pytest.raises(OSError, match=r".+"):
        arena.make(MEMORY, Sizes(data_bytes=4096, parity_bytes=1 << 62, digest_count=0))
    assert link.held == {}
    assert arena.get(MEMORY) is None


def test_strays_are_dropped_and_the_ledger_is_not() -> None:
    link = KeeperLink(None, [])
    arena = ArenaMemory(link)
    arena.make(MEMORY, SIZES)
    successor = ArenaMemory(link)
    successor.make(Memory("gpt", 1, 1), SIZES)
    successor.drop_strays()
    assert sorted(link.held) == ["gpt/1/1/data", "gpt/1/1/guard"]
    successor.free(Memory("gpt", 1, 1))
