"""Rebuilds by real daemons: asked for in every wrong way, and cut into while they run. What comes is bit-exact."""

import json
import re
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from local_cluster import LocalCluster, until
from staged import JOB, held_pieces, stage

NODES, PARITY = 4, 2
SHARD_BYTES = 12 << 20  # with its parity 384 chunks of 64 KiB per node: a second of rebuilding, and many looks at it
TRIES = 5  # to be there in the middle: a look comes late on a busy machine


def entry(cluster: LocalCluster) -> dict[str, Any]:
    """What node 0 says of itself: it collects, so this is not a heartbeat old."""
    status = cluster.try_status(0)
    found: dict[str, Any] = status["nodes"][0]["jobs"].get(JOB, {}) if status else {}
    return found


def is_whole(cluster: LocalCluster) -> bool:
    return bool(entry(cluster).get("whole"))


def caught_in_the_middle(cluster: LocalCluster, strike: Callable[[], object]) -> dict[str, Any]:
    """Lose node 0 and strike while its replacement is being rebuilt; returns what was seen right after."""
    for _ in range(TRIES):
        cluster.kill(0)
        cluster.start([0], wait=False)
        until(lambda: entry(cluster).get("rebuilt_bytes") or is_whole(cluster), "the rebuild moves")
        strike()
        seen = until(lambda: entry(cluster), "the replacement answers")
        if not seen["whole"] and seen["rebuilt_bytes"] < seen["lost_bytes"]:
            return seen
        until(lambda: is_whole(cluster), "the rebuild that was too fast")
    raise AssertionError(f"{TRIES} rebuilds were over before anybody could look")


@pytest.fixture(scope="module")
def staged_cluster() -> Iterator[LocalCluster]:
    """A cluster that every test leaves whole."""
    with LocalCluster(nodes=NODES, parity=PARITY) as cluster:
        cluster.start()
        stage(cluster, shard_bytes=SHARD_BYTES)
        yield cluster


def wait_healthy(cluster: LocalCluster) -> None:
    cluster.wait_status(lambda s: s["verdict"] == "HEALTHY", "all are back")


def test_a_survivor_killed_in_the_middle_is_done_without(staged_cluster: LocalCluster) -> None:
    cluster = staged_cluster
    before = held_pieces(cluster, 0)

    def strike() -> None:
        if 3 in cluster.keepers:
            cluster.kill(3)

    caught_in_the_middle(cluster, strike)
    until(lambda: is_whole(cluster), "the rebuild without the survivor")
    assert held_pieces(cluster, 0) == before
    cluster.wait_status(lambda s: s["nodes"][3]["state"] == "down" and s["verdict"] == "DEGRADED", "one node is lost")
    cluster.start([3])
    wait_healthy(cluster)


def test_a_survivor_that_stands_still_in_the_middle_is_done_without(staged_cluster: LocalCluster) -> None:
    cluster = staged_cluster
    before = held_pieces(cluster, 0)
    try:
        caught_in_the_middle(cluster, lambda: cluster.signal_worker(3, signal.SIGSTOP))
        until(lambda: is_whole(cluster), "the rebuild without the survivor")
        assert held_pieces(cluster, 0) == before
    finally:
        cluster.signal_worker(3, signal.SIGCONT)
    wait_healthy(cluster)


def test_a_replacements_own_worker_killed_in_the_middle_goes_on_where_it_was(staged_cluster: LocalCluster) -> None:
    cluster = staged_cluster
    before = held_pieces(cluster, 0)
    lost = caught_in_the_middle(cluster, lambda: cluster.kill_worker(0))
    cluster.wait_log(0, "were rebuilt already")
    told = re.findall(r": (\d+) chunks of .* were rebuilt already", cluster.log(0))
    until(lambda: is_whole(cluster), "the rebuild by the successor")
    assert held_pieces(cluster, 0) == before
    kept_bytes = int(told[-1]) * (64 << 10)
    assert kept_bytes > 0
    left_bytes = lost["lost_bytes"] - kept_bytes
    assert entry(cluster)["received_bytes"] <= 1.1 * left_bytes, "bytes that were there were fetched again"


def test_recover_says_what_it_finds_and_harms_nothing(staged_cluster: LocalCluster) -> None:
    cluster = staged_cluster
    before = held_pieces(cluster, 0)

    def ends(code: int, *words: str, node: int = 1) -> tuple[str, str]:
        found = cluster.command("recover", *words, node=node)
        assert found.returncode == code, (words, found.stdout, found.stderr)
        return found.stdout, found.stderr

    assert "nothing is lost: no rebuild is needed" in ends(0)[0]
    assert "expected one of n0, n1, n2, n3, found 'n9'" in ends(2, "--node", "n9")[1]
    cluster.kill(0)
    cluster.wait_status(lambda s: s["nodes"][0]["state"] == "down", "the loss is seen", node=1)
    assert "start a replacement" in ends(4, "--node", "n0")[1]
    # A replacement that has no room: something is lost, and stays lost until there is.
    text = cluster.config.read_text()
    cluster.config.write_text(text.replace('"256MiB"', '"8MiB"'))
    cluster.start([0])
    cluster.config.write_text(text)
    cluster.wait_status(lambda s: s["nodes"][0]["jobs"][JOB]["rebuild"] == "failed", "there is no room", node=1)
    plan = json.loads(ends(0, "--dry-run", "--json")[0])
    assert (plan["dry_run"], plan["nodes"], plan["plan"][0]["from"]) == (True, ["n0"], ["n1", "n2", "n3"])
    assert plan["bytes"] == 2 * SHARD_BYTES
    assert "nothing is lost on n2: no rebuild is needed; n0 lost something" in ends(0, "--node", "n2")[0]
    assert not held_pieces(cluster, 0)
    cluster.kill(0)
    cluster.start([0])
    assert "rebuilt 24.0 MiB on n0" in ends(0, "--node", "n0", node=3)[0] or is_whole(cluster)
    assert "nothing is lost" in ends(0, "--node", "n0")[0]
    assert held_pieces(cluster, 0) == before
