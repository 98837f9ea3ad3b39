"""The ledger survives a torn write; descriptors come back by name; a keeper that is gone is not missed."""

import mmap
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from holdfast.daemon.shell.keeping import KeeperLink, LedgerMemory, make_sealed


@pytest.fixture
def link() -> Iterator[KeeperLink]:
    link = KeeperLink(None, [])
    yield link
    for name in link.held:
        link.drop(name)


def test_new_memory_holds_no_ledger(link: KeeperLink) -> None:
    assert LedgerMemory(link).read() is None


def test_a_successor_reads_what_was_written_last(link: KeeperLink) -> None:
    ledger = LedgerMemory(link)
    for payload in (b"one", b"two", b"three"):
        ledger.write(payload)
        assert LedgerMemory(link).read() == payload
    successor = LedgerMemory(link)
    successor.write(b"four")
    assert LedgerMemory(link).read() == b"four"


@pytest.mark.parametrize("newest_copy", [0, 1])
def test_a_torn_copy_leaves_the_one_before(link: KeeperLink, newest_copy: int) -> None:
    ledger = LedgerMemory(link)
    ledger.write(b"older" * 100)
    if newest_copy == 0:
        ledger.write(b"middle" * 100)
    ledger.write(b"newest" * 100)
    descriptor = link.held[LedgerMemory.NAME]
    with mmap.mmap(descriptor, os.fstat(descriptor).st_size) as held:
        at = held.find(b"newest")
        held[at] ^= 1
    assert LedgerMemory(link).read() == (b"middle" if newest_copy == 0 else b"older") * 100


def test_a_ledger_beyond_its_room_is_refused_and_the_last_one_stays(
    link: KeeperLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = LedgerMemory(link)
    ledger.write(b"small")
    monkeypatch.setattr("holdfast.protocol.limits.LEDGER_BYTES", 100)
    with pytest.raises(ValueError, match="takes 101 bytes, the limit is 100"):
        ledger.write(bytes(101))
    monkeypatch.undo()
    assert LedgerMemory(link).read() == b"small"


def test_sealed_memory_can_not_be_truncated() -> None:
    descriptor = make_sealed("test", 4096)
    try:
        for size_bytes in (0, 8192):
            with pytest.raises(PermissionError):
                os.ftruncate(descriptor, size_bytes)
    finally:
        os.close(descriptor)


def test_descriptors_come_from_the_keeper_by_name() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    descriptor = make_sealed("test", 4096)
    socket.send_fds(ours, [b"have job/0/1/data"], [descriptor])
    ours.send(b"start")
    link = KeeperLink(theirs.detach(), [])
    assert list(link.held) == ["job/0/1/data"]
    assert os.fstat(link.held["job/0/1/data"]).st_ino == os.fstat(descriptor).st_ino
    link.drop("job/0/1/data")
    assert ours.recv(100) == b"drop job/0/1/data"
    ours.close()
    link.hold("late", descriptor)  # the keeper is gone: said in the log, not raised
    link.drop("late")
    link.close()


def test_what_a_keeper_says_that_is_not_understood_is_left_and_its_descriptors_closed() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    descriptor = make_sealed("test", 4096)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for message, given in (
        (b"\xff\xfe ledger", [descriptor]),
        (b"have nothing", []),
        (b"have ledger", [descriptor]),
        (b"have ledger", [descriptor]),
        (b"lend ledger", [descriptor]),
        (b"start", []),
    ):
        socket.send_fds(ours, [message], given)
    link = KeeperLink(theirs.detach(), [])
    assert list(link.held) == ["ledger"]
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 1
    link.drop("ledger")
    link.close()
    ours.close()
    os.close(descriptor)
