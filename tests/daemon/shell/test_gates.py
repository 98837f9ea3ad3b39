"""A crowd on a port: newcomers wait outside, who is in stays in, and when it has gone the port is open again."""

import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from holdfast.daemon.shell import gates
from holdfast.daemon.shell.gates import Gates, ask_for_descriptors, connections_max


class Port:
    """A listener of this process, and those who came."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=500)
        self.number: int = self.listener.getsockname()[1]
        self.stack = ExitStack()
        self.stack.enter_context(self.listener)

    def come(self, timeout_s: float = 10.0) -> tuple[socket.socket, socket.socket]:
        """Connect; both ends."""
        near = self.stack.enter_context(socket.create_connection(("127.0.0.1", self.number), timeout=timeout_s))
        far, _ = self.listener.accept()
        return near, self.stack.enter_context(far)


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[Port]:
    monkeypatch.setattr(gates, "_LOOK_S", 0.0)
    made = Port()
    with made.stack:
        yield made


def test_a_crowd_waits_outside_and_who_is_in_stays_in(port: Port, caplog: pytest.LogCaptureFixture) -> None:
    guard = Gates({port.number: "bulk"}, node_count=2)
    inside = [port.come() for _ in range(connections_max(2))]
    guard.look()
    assert not guard.shut
    inside.append(port.come())
    guard.look()
    assert guard.shut == {port.number}
    assert f"(bulk): expected at most {connections_max(2)} connections, found {connections_max(2) + 1}" in caplog.text
    with pytest.raises(TimeoutError):
        port.come(timeout_s=0.2)
    near, far = inside[0]
    near.sendall(b"still here")
    assert far.recv(100) == b"still here"
    guard.look()
    assert len([line for line in caplog.messages if "expected at most" in line]) == 1  # told once
    for ends in inside[1:]:
        for end in ends:
            end.close()
    guard.look()
    assert not guard.shut
    assert port.come()


def test_few_connections_are_not_even_counted(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "_looked_at", None)
    guard = Gates({port.number: "bulk"}, node_count=500)
    port.come()
    guard.look()


def test_descriptors_are_asked_for_up_to_the_hard_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
        assert ask_for_descriptors() == min(hard, 65536)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
