"""Who is let in at the Unix socket: this user, root, and members of one configured group; nobody else."""

import grp
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from holdfast.daemon.shell.door import Door
from holdfast.protocol import messages
from holdfast.protocol.exit_codes import OperatorError

WELCOME = messages.Welcome(protocol=1, cluster="lab", epoch=1, node=0, node_name="a", token="", endpoint="")
STRANGER = 54321  # a user and group that nobody has
IN, OUT, CLOSED, BROKEN = range(4)

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can knock as somebody else")


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="hf-door-"))
    made.chmod(0o755)  # whoever is refused is refused by the door
    yield made
    shutil.rmtree(made)


def knock(door: Door, *, user: int, groups: list[int]) -> int:
    """Knock as another user and let the door look; what the other one saw."""
    pid = os.fork()
    if pid == 0:  # no new program: this interpreter may lie where only root can read
        seen = BROKEN
        try:
            os.setgroups(groups)
            os.setgid(STRANGER)
            os.setuid(user)
            seen = _seen_at(door.path)
        finally:
            os._exit(seen)
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        door.accept(WELCOME)
        os.sched_yield()
    return os.waitstatus_to_exitcode(ended[1])


def _seen_at(path: Path) -> int:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.settimeout(10)
        try:
            client.connect(str(path))
        except PermissionError:
            return CLOSED
        return IN if client.recv(8192) else OUT


def test_this_user_is_let_in_and_the_socket_is_closed_to_others(folder: Path) -> None:
    door = Door(folder / "s.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.connect(str(door.path))
        arrived = door.accept(WELCOME)
        assert arrived is not None
        assert arrived.pid == os.getpid()
    assert door.path.stat().st_mode & 0o777 == 0o600
    door.close()


@as_root
def test_a_stranger_is_refused_by_credentials_even_where_the_file_is_open(folder: Path) -> None:
    door = Door(folder / "s.sock")
    assert knock(door, user=STRANGER, groups=[]) == CLOSED
    door.path.chmod(0o666)
    assert knock(door, user=STRANGER, groups=[]) == OUT
    door.close()


@as_root
def test_members_of_the_configured_group_are_let_in(folder: Path) -> None:
    group = grp.getgrall()[-1]
    door = Door(folder / "s.sock", group=group.gr_name)
    assert door.path.stat().st_mode & 0o777 == 0o660
    assert door.path.stat().st_gid == group.gr_gid
    assert knock(door, user=STRANGER, groups=[group.gr_gid]) == IN
    door.path.chmod(0o666)
    assert knock(door, user=STRANGER, groups=[]) == OUT
    door.close()


def test_a_group_that_is_not_there_is_the_operators_business(folder: Path) -> None:
    with pytest.raises(OperatorError, match=r"daemon\.socket_group: expected a group of this host, found 'no-such'"):
        Door(folder / "s.sock", group="no-such")
