"""`holdfast keys`: files that zmq.auth reads, closed to others, never overwritten."""

import json
import os
from pathlib import Path

import pytest
import zmq.auth
from holdfast.cli.keys import read_public_keys, rotate_keys, write_keys
from holdfast.cli.main import main
from holdfast.protocol.exit_codes import ExitCode, OperatorError


def test_the_files_are_certificates_of_matching_pairs(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "keys"
    write_keys(directory, ["alpha", "beta"])
    assert sorted(path.name for path in directory.iterdir()) == [
        "alpha.key",
        "alpha.key_secret",
        "beta.key",
        "beta.key_secret",
    ]
    for name in ("alpha", "beta"):
        public, secret = zmq.auth.load_certificate(directory / f"{name}.key_secret")
        assert secret is not None
        assert zmq.curve_public(secret) == public
        assert zmq.auth.load_certificate(directory / f"{name}.key") == (public, None)
        assert read_public_keys(directory)[name].encode() == public
    assert len(zmq.auth.load_certificates(directory)) == 2


def test_secrets_are_closed_to_others_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_keys(tmp_path / "keys", ["a"])
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "keys").iterdir()}
    assert modes == {"a.key": 0o644, "a.key_secret": 0o600}
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700


def test_a_folder_that_was_open_is_closed(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    write_keys(tmp_path, ["a"])
    assert tmp_path.stat().st_mode & 0o777 == 0o700


def test_a_key_that_appears_meanwhile_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.cli.keys._refuse_to_overwrite", lambda directory, names: None)  # it looked too early
    (tmp_path / "b.key").write_text("somebody else's")
    with pytest.raises(OperatorError, match="File exists"):
        write_keys(tmp_path, ["a", "b"])
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("b.key", "somebody else's")]


@pytest.mark.parametrize("there", ["b.key", "b.key_secret"])
def test_a_key_is_never_overwritten_and_nothing_else_is_written(tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_text("old")
    with pytest.raises(OperatorError, match=f"already has {there}: nothing was written") as caught:
        write_keys(tmp_path, ["a", "b"])
    assert caught.value.exit_code is ExitCode.USAGE
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "old"


def test_a_failure_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def failing(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OperatorError, match="No space left on device"):
        write_keys(tmp_path, ["a", "b"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("names", "words"), [(["../a"], "can't name a node"), (["a", "b", "a"], "named twice: a")])
def test_bad_names_are_refused(tmp_path: Path, names: list[str], words: str) -> None:
    with pytest.raises(OperatorError, match=words):
        write_keys(tmp_path / "keys", names)
    assert not (tmp_path / "keys").exists()


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("")
    with pytest.raises(OperatorError, match="give --dir a folder that you may write"):
        write_keys(tmp_path / "keys", ["a"])


def test_init_says_what_to_do_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "keys"
    assert main(["keys", "init", "--dir", str(directory), "a", "b"]) == ExitCode.DONE
    assert capsys.readouterr().out == (
        f"Made 2 key pairs in {directory}.\n"
        "Copy to every node all *.key files and its own NODE.key_secret, and nobody else's.\n"
        f'Then set keys_dir = "{directory}" under [security] in the config of all nodes.\n'
    )
    assert main(["keys", "init", "--dir", str(directory), "b"]) == ExitCode.USAGE


def test_init_takes_names_from_a_config(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text('[cluster]\nname = "x"\nparity = 0\n[[node]]\nname = "n0"\naddress = "h:1"\n')
    assert main(["keys", "init", "--dir", str(tmp_path / "keys"), "--config", str(config)]) == ExitCode.DONE
    assert list(read_public_keys(tmp_path / "keys")) == ["n0"]


@pytest.mark.parametrize("arguments", [[], ["--config", "c.toml", "a"]])
def test_init_wants_names_or_a_config(tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "init", "--dir", str(tmp_path), *arguments]) == ExitCode.USAGE
    assert "either names of nodes or --config FILE" in capsys.readouterr().err


def test_show_lists_public_keys_and_no_secret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_keys(tmp_path, ["a", "long-name"])
    (tmp_path / "long-name.key_secret").unlink()
    keys = read_public_keys(tmp_path)
    assert main(["keys", "show", "--dir", str(tmp_path)]) == ExitCode.DONE
    assert capsys.readouterr().out == (
        f"node       public key                                secret here\n"
        f"a          {keys['a']}  yes\n"
        f"long-name  {keys['long-name']}  no\n"
    )
    assert main(["keys", "show", "--dir", str(tmp_path), "--json"]) == ExitCode.DONE
    shown = json.loads(capsys.readouterr().out)
    assert shown == {"schema": "holdfast.keys/1", "dir": str(tmp_path), "keys": keys, "retired": [], "trainers": {}}


def test_trainers_have_pairs_of_their_own_beside_the_nodes_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "keys"
    keys.mkdir()
    assert main(["keys", "trainer", "--dir", str(keys)]) == ExitCode.USAGE
    assert "expected the folder with the nodes' keys, found none of theirs" in capsys.readouterr().err
    write_keys(keys, ["a"])
    assert main(["keys", "trainer", "--dir", str(keys)]) == ExitCode.DONE
    assert "HOLDFAST_KEYS_DIR" in capsys.readouterr().out
    assert (keys / "trainers" / "trainer.key_secret").stat().st_mode & 0o777 == 0o600
    assert "SECRET key of trainer trainer" in (keys / "trainers" / "trainer.key_secret").read_text()
    assert main(["keys", "trainer", "--dir", str(keys)]) == ExitCode.USAGE
    assert "Keys are never overwritten" in capsys.readouterr().err
    assert main(["keys", "show", "--dir", str(keys)]) == ExitCode.DONE
    assert read_public_keys(keys / "trainers")["trainer"] in capsys.readouterr().out
    assert set(read_public_keys(keys)) == {"a"}, "a trainer is no node"


def test_show_of_an_empty_a_missing_and_a_damaged_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "show", "--dir", str(tmp_path)]) == ExitCode.DONE
    assert capsys.readouterr().out.startswith(f"No keys in {tmp_path}. Make some with 'holdfast keys init")
    assert main(["keys", "show", "--dir", str(tmp_path / "none")]) == ExitCode.USAGE
    assert "is no folder; make keys with" in capsys.readouterr().err
    (tmp_path / "a.key").write_text('curve\n    public-key = "short"\n')
    assert main(["keys", "show", "--dir", str(tmp_path)]) == ExitCode.USAGE
    assert "of 40 characters; copy it again" in capsys.readouterr().err


def test_rotation_keeps_the_old_key_listed_until_it_is_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_keys(tmp_path, ["a", "b"])
    before = read_public_keys(tmp_path)
    assert main(["keys", "rotate", "--dir", str(tmp_path), "a"]) == ExitCode.DONE
    assert "holdfast upgrade" in capsys.readouterr().out
    public, secret = zmq.auth.load_certificate(tmp_path / "a.key_secret")
    assert secret is not None
    assert zmq.curve_public(secret) == public == read_public_keys(tmp_path)["a"].encode()
    assert public != before["a"].encode()
    assert zmq.auth.load_certificate(tmp_path / "a.key_retired")[0] == before["a"].encode()
    assert (tmp_path / "a.key_secret").stat().st_mode & 0o777 == 0o600
    assert read_public_keys(tmp_path)["b"] == before["b"]
    assert main(["keys", "rotate", "--dir", str(tmp_path), "b", "a"]) == ExitCode.USAGE  # a's last one is open
    assert "the last rotation of a is not finished" in capsys.readouterr().err
    assert read_public_keys(tmp_path)["b"] == before["b"]
    assert main(["keys", "rotate", "--dir", str(tmp_path), "--finish"]) == ExitCode.DONE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.key", "a.key_secret", "b.key", "b.key_secret"]


def test_rotation_of_a_stranger_changes_nothing(tmp_path: Path) -> None:
    write_keys(tmp_path, ["a"])
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    with pytest.raises(OperatorError, match=r"no key of .z. in .*, found a"):
        rotate_keys(tmp_path, ["a", "z"])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before
