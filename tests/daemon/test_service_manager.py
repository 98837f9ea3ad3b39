"""What a service manager hears and hands back, with this test in its place."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from holdfast.daemon.service_manager import ServiceManager

HEIR = """
import os, sys
from holdfast.daemon.service_manager import ServiceManager
stored = [int(word) for word in sys.argv[1].split(",")]
for index, descriptor in enumerate(stored):
    os.dup2(descriptor, 100 + index)
for index in range(len(stored)):
    os.dup2(100 + index, 3 + index)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(stored)), "LISTEN_FDNAMES": sys.argv[2]}
manager = ServiceManager(os.environ)
for name, descriptor in manager.given().items():
    print(name, os.pread(descriptor, 100, 0).decode(), os.get_inheritable(descriptor))
print(sorted(name for name in os.environ if name.startswith("LISTEN")), manager.given())
"""


def test_without_a_manager_nothing_happens() -> None:
    manager = ServiceManager({})
    manager.tell("READY=1")
    manager.store("a", 0)
    assert manager.given() == {}
    assert manager.watchdog_s is None


@pytest.mark.parametrize("abstract", [False, True])
def test_words_and_descriptors_arrive(tmp_path: Path, abstract: bool) -> None:
    path = f"holdfast-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
        ear.bind("\0" + path if abstract else path)
        ear.settimeout(10)
        environment = {"NOTIFY_SOCKET": "@" + path if abstract else path, "WATCHDOG_USEC": "9000000", "PATH": "/"}
        manager = ServiceManager(environment)
        assert environment == {"PATH": "/"}  # no child speaks in our name
        assert manager.watchdog_s == 9.0
        manager.tell("READY=1", "STATUS=fine")
        assert ear.recv(1000) == b"READY=1\nSTATUS=fine"
        memory = os.memfd_create("test")
        manager.store("gpt/0/1/data", memory)
        text, received, _, _ = socket.recv_fds(ear, 1000, 2)
        assert text == b"FDSTORE=1\nFDPOLL=0\nFDNAME=gpt/0/1/data"
        assert os.fstat(received[0]).st_ino == os.fstat(memory).st_ino
        manager.unstore("gpt/0/1/data")
        assert ear.recv(1000) == b"FDSTOREREMOVE=1\nFDNAME=gpt/0/1/data"
        manager.reloading()
        assert ear.recv(1000).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
        for descriptor in (memory, *received):
            os.close(descriptor)


def test_a_manager_that_is_gone_is_not_missed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "gone")}).tell("READY=1")
    assert "does not hear READY=1" in capsys.readouterr().err


def test_a_watchdog_for_another_process_is_not_ours() -> None:
    assert ServiceManager({"WATCHDOG_USEC": "9000000", "WATCHDOG_PID": "1"}).watchdog_s is None


def test_an_heir_finds_what_was_stored_by_name_once(tmp_path: Path) -> None:
    memories = []
    for text in ("one", "nameless", "two", "one again"):
        memories.append(os.memfd_create("test"))
        os.write(memories[-1], text.encode())
    numbers = ",".join(map(str, memories))
    ended = subprocess.run(
        [sys.executable, "-c", HEIR, numbers, "ledger:stored:gpt/0/1/data:ledger"],
        pass_fds=memories, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert ended.stdout.splitlines() == ["ledger one False", "gpt/0/1/data two False", "[] {}"]
    for descriptor in memories:
        os.close(descriptor)


def test_descriptors_meant_for_another_process_are_left_alone() -> None:
    environment = {"LISTEN_PID": "1", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b"}
    assert ServiceManager(environment).given() == {}
    assert environment == {}


@pytest.mark.parametrize("usec", ["\u00b2", "-1", "9" * 5000, "1.5", ""])
def test_a_watchdog_that_is_no_number_is_none(usec: str) -> None:
    assert ServiceManager({"WATCHDOG_USEC": usec}).watchdog_s is None


@pytest.mark.parametrize("count", ["\u00b2", "9" * 5000, "-1"])
def test_descriptors_that_are_no_number_are_none(count: str) -> None:
    said = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": count, "LISTEN_FDNAMES": "a"}
    assert ServiceManager(said).given() == {}
