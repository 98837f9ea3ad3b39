"""A trainer's keys: each way in which they can be wrong has its own words, and exit code 5."""

from collections.abc import Callable
from pathlib import Path

import pytest
from holdfast.cli.keys import read_public_keys, rotate_keys, write_keys, write_trainer_keys
from holdfast.client.errors import RefusedError
from holdfast.client.own_keys import VARIABLE, wire_keys
from holdfast.protocol.exit_codes import ExitCode


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_keys(tmp_path, ["n0", "n1"])
    write_trainer_keys(tmp_path, ["trainer"])
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    return tmp_path


def test_without_the_variable_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert wire_keys(None, "h") == [None]


def test_the_node_is_the_one_that_is_named_or_the_host_or_the_only_one(folder: Path) -> None:
    keys = {name: key.encode() for name, key in read_public_keys(folder).items()}

    def server(node: str | None, host: str) -> bytes:
        (found,) = wire_keys(node, host)
        assert found is not None
        assert found.public == read_public_keys(folder / "trainers")["trainer"].encode()
        return found.server

    assert server("n1", "n0") == keys["n1"]
    assert server(None, "n0") == keys["n0"]
    with pytest.raises(RefusedError, match=r"which node is on 10.0.0.1\? .* has keys of n0, n1. Say it in the address"):
        wire_keys(None, "10.0.0.1")
    with pytest.raises(RefusedError, match="no public key of node n7"):
        wire_keys("n7", "10.0.0.1")
    (folder / "n1.key").unlink()
    assert server(None, "10.0.0.1") == keys["n0"]


def test_while_a_node_changes_its_key_either_may_be_the_one(folder: Path) -> None:
    before = read_public_keys(folder)["n0"].encode()
    rotate_keys(folder, ["n0"])
    found = wire_keys("n0", "h")
    assert [one.server for one in found if one is not None] == [read_public_keys(folder)["n0"].encode(), before]


def missing(folder: Path) -> None:
    (folder / "trainers" / "trainer.key_secret").unlink()


def several(folder: Path) -> None:
    write_trainer_keys(folder, ["other"])


def readable(folder: Path) -> None:
    (folder / "trainers" / "trainer.key_secret").chmod(0o644)


def public_only(folder: Path) -> None:
    (folder / "trainers" / "trainer.key_secret").write_text((folder / "n0.key").read_text())


def damaged(folder: Path) -> None:
    (folder / "n0.key").write_text("nonsense")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (missing, "expected one secret key of this trainer .* found none. Make one with 'holdfast keys trainer"),
        (several, "found other.key_secret, trainer.key_secret"),
        (readable, "to be closed to other users, found mode 0644. Close it with 'chmod 600"),
        (public_only, "holds no secret key"),
        (damaged, "n0.key has no line 'public-key"),
    ],
)
def test_each_fault_has_its_words(folder: Path, fault: Callable[[Path], None], words: str) -> None:
    fault(folder)
    with pytest.raises(RefusedError, match=words) as caught:
        wire_keys("n0", "h")
    assert caught.value.exit_code == ExitCode.WRONG_CLUSTER
    assert not caught.value.retry
