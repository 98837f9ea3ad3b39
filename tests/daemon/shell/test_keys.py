"""Each way in which keys can be wrong has its own sentence and exit code 5."""

import shutil
from pathlib import Path

import pytest
from holdfast.cli.keys import rotate_keys, write_keys
from holdfast.daemon.shell.keys import load_keys, reread
from holdfast.daemon.shell.network import public_key_of
from holdfast.protocol.config import ClusterConfig, NodeConfig
from holdfast.protocol.exit_codes import ExitCode, OperatorError


@pytest.fixture
def config(tmp_path: Path) -> ClusterConfig:
    folder = tmp_path / "keys"
    write_keys(folder, ["a", "b", "c"])
    nodes = [NodeConfig(name=name, host="127.0.0.1", port=7400 + i, domain=name) for i, name in enumerate("abc")]
    return ClusterConfig(cluster_name="lab", nodes=tuple(nodes), parity=1, keys_dir=str(folder))


def refusal(config: ClusterConfig, node: int = 0) -> str:
    with pytest.raises(OperatorError) as caught:
        load_keys(config, node, public_of=public_key_of)
    assert caught.value.exit_code is ExitCode.WRONG_CLUSTER
    text = str(caught.value)
    assert text.startswith("security.keys_dir: ")
    return text


def folder_of(config: ClusterConfig) -> Path:
    assert config.keys_dir is not None
    return Path(config.keys_dir)


def test_good_keys_are_read(config: ClusterConfig) -> None:
    keys = load_keys(config, 1, public_of=public_key_of)
    assert keys is not None
    assert keys.nodes[keys.public] == 1
    assert sorted(keys.nodes.values()) == [0, 1, 2]
    assert keys.of(1) == keys.public
    assert not keys.several(1)


def test_every_fault_says_what_it_is_and_what_to_do(config: ClusterConfig, tmp_path: Path) -> None:
    folder, good = folder_of(config), tmp_path / "good"
    shutil.copytree(folder, good)
    said = []

    def broken() -> None:
        said.append(refusal(config))
        shutil.rmtree(folder)
        shutil.copytree(good, folder)

    (folder / "a.key_secret").unlink()
    broken()
    assert "a.key_secret is missing" in said[-1]
    (folder / "a.key_secret").chmod(0o644)
    broken()
    assert "closed to other users, found mode 0644" in said[-1]
    assert "chmod 600" in said[-1]
    (folder / "b.key").unlink()
    (folder / "c.key").unlink()
    broken()
    assert "no public key of b, c" in said[-1]
    (folder / "a.key_secret").write_text((folder / "b.key_secret").read_text())  # somebody else's, pair in itself
    broken()
    assert "expected the secret key of a in" in said[-1]
    assert "found that of b" in said[-1]
    secret = (folder / "a.key_secret").read_text()
    (folder / "a.key_secret").write_text(secret[: secret.index("secret-key")])
    broken()
    assert "holds no secret key" in said[-1]
    other = (folder / "b.key_secret").read_text()
    mixed = secret[: secret.index("secret-key")] + other[other.index("secret-key") :]
    (folder / "a.key_secret").write_text(mixed)
    broken()
    assert "are not one pair" in said[-1]
    (folder / "c.key").write_text("half a fi")
    broken()
    assert "c.key has no line 'public-key" in said[-1]
    (folder / "c.key").write_text((folder / "b.key").read_text())
    broken()
    assert "b and c have the same public key" in said[-1]
    rotate_keys(folder, ["a"])
    (folder / "a.key_secret").write_text(secret)  # the new one never came here
    (folder / "a.key_secret").chmod(0o600)
    broken()
    assert "replaced by 'holdfast keys rotate' and is only listed as retired" in said[-1]
    rotate_keys(folder, ["a"])
    (folder / "a.key_secret").write_text(secret)
    (folder / "a.key_retired").unlink()  # the rotation is finished
    broken()
    assert "is not, or not any more, the one that" in said[-1]
    shutil.rmtree(folder)
    said.append(refusal(config))
    assert "expected a folder, found none" in said[-1]
    assert len({text.replace(str(folder), "") for text in said}) == 11


def test_a_group_may_read_a_mounted_secret(config: ClusterConfig) -> None:
    (folder_of(config) / "a.key_secret").chmod(0o440)
    assert load_keys(config, 0, public_of=public_key_of) is not None


def test_a_retired_key_still_speaks_for_its_node(config: ClusterConfig) -> None:
    before = load_keys(config, 0, public_of=public_key_of)
    assert before is not None
    rotate_keys(folder_of(config), ["a"])
    peer = load_keys(config, 1, public_of=public_key_of)
    assert peer is not None
    assert peer.nodes[before.public] == 0
    assert peer.several(0)
    assert peer.of(0) != before.public == peer.of(0, 1)
    assert peer.of(0, 2) == peer.of(0)


def test_no_folder_configured_means_no_keys() -> None:
    node = NodeConfig(name="a", host="127.0.0.1", port=7400, domain="a")
    config = ClusterConfig(cluster_name="lab", nodes=(node,), parity=0)
    assert load_keys(config, 0, public_of=public_key_of) is None


def test_a_list_read_again_knows_the_new_key_and_a_broken_one_changes_nothing(config: ClusterConfig) -> None:
    keys = load_keys(config, 1, public_of=public_key_of)
    assert keys is not None
    rotate_keys(folder_of(config), ["a"])
    fresh = reread(keys, config)
    assert fresh.of(0) != keys.of(0) == fresh.of(0, 1)
    assert (fresh.public, fresh.secret) == (keys.public, keys.secret)
    (folder_of(config) / "c.key").unlink()
    assert reread(fresh, config) is fresh
