"""Keys that are wrong, on real daemons: each way ends with exit code 5 and its own words; one expired isn't let in."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from holdfast.cli.keys import rotate_keys, write_keys
from local_cluster import DEADLINE_S, LocalCluster

MakeCluster = Callable[..., LocalCluster]


def missing(folder: Path) -> None:
    (folder / "n0.key_secret").unlink()


def world_readable(folder: Path) -> None:
    (folder / "n0.key_secret").chmod(0o644)


def wrong(folder: Path) -> None:
    (folder / "n0.key_secret").write_text((folder / "n1.key_secret").read_text())


def retired(folder: Path) -> None:
    before = (folder / "n0.key_secret").read_text()
    rotate_keys(folder, ["n0"])
    (folder / "n0.key_secret").write_text(before)


def expired(folder: Path) -> None:
    retired(folder)
    (folder / "n0.key_retired").unlink()


FAULTS: dict[Callable[[Path], None], str] = {
    missing: "n0.key_secret is missing. Copy this node's *.key_secret file",
    world_readable: "to be closed to other users, found mode 0644. Close it with 'chmod 600",
    wrong: "expected the secret key of n0 in",
    retired: "was replaced by 'holdfast keys rotate' and is only listed as retired",
    expired: "the secret key of n0 is not, or not any more, the one that",
}
EXPOSED = "expected keys, since node n0 and 1 more would listen on 10.255.255.1:7400, which others can reach"


def config_of(folder: Path, host: str, security: str) -> Path:
    config = folder / "cluster.toml"
    nodes = [f'[[node]]\nname = "n{i}"\naddress = "{host}:{7400 + i}"' for i in range(2)]
    config.write_text("\n".join(['[cluster]\nname = "test"\nparity = 1', security, *nodes]))
    return config


def started(config: Path, *module: str) -> subprocess.Popen[str]:
    words = ["--config", str(config), "--node", "n0", "--socket", str(config.parent / "s")]
    return subprocess.Popen([sys.executable, "-m", *module, *words], stderr=subprocess.PIPE, text=True)


def test_each_fault_ends_with_code_5_and_its_own_words(tmp_path: Path) -> None:
    running = []
    for fault, words in FAULTS.items():
        folder = tmp_path / fault.__name__
        folder.mkdir()
        write_keys(folder / "keys", ["n0", "n1"])
        fault(folder / "keys")
        config = config_of(folder, "127.0.0.1", f'[security]\nkeys_dir = "{folder}/keys"')
        running.append((started(config, "holdfast.daemon.keeper", "--"), words))
    (tmp_path / "open").mkdir()
    config = config_of(tmp_path / "open", "10.255.255.1", "")
    running += [
        (started(config, "holdfast.cli.main", "daemon"), EXPOSED),
        (started(config, "holdfast.daemon.keeper", "--"), EXPOSED),
    ]
    for daemon, words in running:
        _, said = daemon.communicate(timeout=2 * DEADLINE_S)
        assert daemon.returncode == 5, said
        assert words in said
        assert "Traceback" not in said


def test_a_key_that_left_the_list_is_not_let_in(make_cluster: MakeCluster, tmp_path: Path) -> None:
    """n1 goes on with a key that was rotated away: whoever reads the list again refuses it, and it says so."""
    keys = tmp_path / "keys"
    write_keys(keys, ["n0", "n1"])
    cluster = make_cluster(nodes=2, parity=1, keys_dir=keys)
    cluster.start()
    rotate_keys(keys, ["n1"])
    (keys / "n1.key_retired").unlink()
    cluster.kill_worker(0)
    seen = cluster.wait_status(lambda s: s["nodes"][0]["state"] == "refused", "n1 hears that it is refused", node=1)
    assert "refuses us: it does not list our key, or not any more" in seen["nodes"][0]["reason"]
    cluster.kill_worker(1)  # its successor has the new one
    cluster.wait_up()
