"""Names of nodes: looked up aside, again while somebody is away, and a resolver that is silent holds nobody up."""

import socket
import threading

import pytest
from holdfast.daemon.shell import names
from holdfast.daemon.shell.names import Names, resolved


class Resolver:
    """Stands in for the system's: a table; a name without an entry is not answered until the end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.table: dict[str, list[str]] = {}
        self.asked: list[str] = []
        self.end = threading.Event()
        monkeypatch.setattr(names, "resolved", self._answer)
        monkeypatch.setattr(names, "_LOOK_S", 0.0)

    def _answer(self, host: str) -> list[str]:
        self.asked.append(host)
        if host not in self.table:
            self.end.wait()
            raise socket.gaierror("nobody answers")
        return self.table[host]


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Resolver:
    return Resolver(monkeypatch)


def looked(known: Names, node: int) -> None:
    """Look a node up and wait for the end of it."""
    known.look(node)
    for thread in threading.enumerate():
        if thread.name == "names":
            thread.join(10)


def test_addresses_are_what_they_are(resolver: Resolver) -> None:
    known = Names(["10.0.0.1", "fd00::2", "fe80::1%eth0"])
    assert [known.of(node) for node in range(3)] == ["10.0.0.1", "fd00::2", "fe80::1%eth0"]
    looked(known, 0)
    assert resolver.asked == []


def test_a_name_is_found_and_follows_its_node(resolver: Resolver) -> None:
    known = Names(["10.0.0.1", "n1.svc"])
    assert known.of(1) is None
    resolver.table["n1.svc"] = ["10.0.0.2", "10.0.0.3"]
    looked(known, 1)
    assert known.of(1) == "10.0.0.2"
    resolver.table["n1.svc"] = ["10.0.0.3", "10.0.0.2"]  # the same two in another order: nobody moved
    looked(known, 1)
    assert known.of(1) == "10.0.0.2"
    resolver.table["n1.svc"] = ["10.0.0.9"]
    looked(known, 1)
    assert known.of(1) == "10.0.0.9"


def test_a_silent_resolver_holds_nobody_up_and_takes_few_threads(
    resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "_LOOKS_COUNT_MAX", 3)
    known = Names([f"n{node}.svc" for node in range(10)])
    for _ in range(5):
        for node in range(10):
            known.look(node)  # returns at once
    try:
        assert len([thread for thread in threading.enumerate() if thread.name == "names"]) == 3
        assert len(resolver.asked) <= 3
    finally:
        resolver.end.set()
    looked(known, 0)
    assert known.of(0) is None


def test_looks_are_not_repeated_too_soon(resolver: Resolver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "_LOOK_S", 1000.0)
    resolver.table["n0.svc"] = ["10.0.0.2"]
    known = Names(["n0.svc"])
    for _ in range(5):
        looked(known, 0)
    assert resolver.asked == ["n0.svc"]


def test_the_system_is_asked() -> None:
    assert "127.0.0.1" in resolved("localhost") or "::1" in resolved("localhost")

    with pytest.raises(socket.gaierror):
        resolved("no-such-name.invalid")
