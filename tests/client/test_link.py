"""A daemon that says nonsense costs a client its connection: one kind of error, and no descriptor is left open."""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from holdfast.client.errors import DaemonUnreachableError
from holdfast.client.link import Link, LinkLostError
from holdfast.protocol import frames, limits, messages

GIVEN = messages.MemoryGiven("a", 0, 1, 1 << 20)  # more than the descriptor has


def welcome(folder: Path) -> bytes:
    endpoint = f"ipc://{folder}/messages"
    return frames.encode(messages.Welcome(limits.PROTOCOL_VERSION, "lab", 1, 0, "a", "token", endpoint))


@pytest.fixture
def link_to(tmp_path: Path) -> Iterator[Callable[..., Link]]:
    """Connects to a daemon that says these frames, each with one descriptor beside it from the second on."""
    wake, ended, threads = os.eventfd(0, os.EFD_NONBLOCK), threading.Event(), []
    memory = os.memfd_create("test")

    def connect(*said: bytes) -> Link:
        path = tmp_path / "door"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with listener, listener.accept()[0] as one:
                for index, frame in enumerate(said):
                    socket.send_fds(one, [frame], [memory] if index else [])
                ended.wait()

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        return Link(path, wake_fd=wake)

    yield connect
    ended.set()
    for thread in threads:
        thread.join()
    for descriptor in (wake, memory):
        os.close(descriptor)


def test_another_word_than_a_welcome_is_refused(link_to: Callable[..., Link]) -> None:
    with pytest.raises(DaemonUnreachableError, match=r"expected a welcome from the daemon on .* found MemoryGiven"):
        link_to(frames.encode(GIVEN))


@pytest.mark.parametrize("said", [b"\xc1nonsense", frames.encode(GIVEN)], ids=["nonsense", "too little memory"])
def test_memory_that_can_not_be_taken_ends_the_connection(
    link_to: Callable[..., Link], tmp_path: Path, said: bytes
) -> None:
    link = link_to(welcome(tmp_path), said)
    with pytest.raises(LinkLostError, match="gives what can't be taken"):
        link.pump(30.0)
    link.close()
