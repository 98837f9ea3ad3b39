"""Drills prove what is there and no more: damage, losses and parity 0 are said, and nothing is touched."""

from typing import Any

from holdfast.daemon.core.health import Resting
from holdfast.protocol import messages
from sim.rot import RestingCluster


def ask(rot: RestingCluster, node: int = 1) -> None:
    """An operator's question on one node; all nodes drill."""
    rot.cluster.command(node, messages.AskDrill(100))
    rot.pass_time(3.0)


def row(rot: RestingCluster, node: int = 0) -> dict[str, Any]:
    worker = rot.cluster.machines[node].worker
    assert worker is not None
    status = worker.node.status()
    assert isinstance(status["jobs"], list)
    found: dict[str, Any] = status["jobs"][0]
    return found


def test_a_whole_cluster_is_proven_to_survive_any_m_losses() -> None:
    rot = RestingCluster(parity=2, period_s=0)
    assert row(rot)["drill"]["proven_step"] is None
    ask(rot)
    found = row(rot)["drill"]
    assert (found["proven_step"], found["survives"], found["failures"], found["drills"]) == (0, 2, 0, 1)
    assert found["patterns"] >= found["stripes"] >= 4
    assert found["columns"] > 0
    assert found["rebuild_bytes_per_s"] > 0
    assert found["age_s"] < 4.0
    assert rot.is_right()
    ask(rot)
    assert row(rot)["drill"]["drills"] == 2


def test_drills_come_by_themselves() -> None:
    rot = RestingCluster(parity=1, period_s=0, drill_period_s=20)
    rot.wait(lambda: row(rot)["drill"]["drills"] >= 2, 60.0)
    assert row(rot)["drill"]["proven_step"] == 0


def test_wrong_bytes_fail_the_drill_and_show_in_the_verdict() -> None:
    rot = RestingCluster(parity=2, period_s=0)  # nothing else reads
    for node in range(4):
        for wanted in rot.chunks(node):
            if wanted.kind == "parity":
                rot.flip(node, wanted, with_digest=True)
    before = [bytes(rot.held(node).parity) for node in range(4)]
    ask(rot)
    found = row(rot)
    assert found["drill"]["failures"] > 0
    assert found["drill"]["proven_step"] is None
    assert found["verdict"] == "DEGRADED"
    assert "the drill failed" in found["reason"]
    assert [bytes(rot.held(node).parity) for node in range(4)] == before


def test_a_chunk_that_its_holder_can_not_serve_fails_the_drill_and_is_repaired() -> None:
    rot = RestingCluster(parity=2, period_s=0)
    rot.flip(2, Resting("data", 0))
    ask(rot)
    assert row(rot)["drill"]["failures"] > 0
    rot.pass_time(10.0)
    ask(rot)
    assert row(rot)["drill"]["failures"] == 0
    assert row(rot)["drill"]["proven_step"] == 0


def test_with_a_node_away_one_loss_less_is_proven() -> None:
    rot = RestingCluster(parity=2, period_s=0)
    rot.cluster.machines[3].crash_worker()
    rot.pass_time(4.0)
    ask(rot)
    found = row(rot)["drill"]
    assert (found["proven_step"], found["survives"]) == (0, 1)
    rot.cluster.machines[2].crash_worker()
    rot.cluster.machines[1].crash_worker()
    rot.pass_time(4.0)
    ask(rot, node=0)
    assert row(rot)["drill"]["proven_step"] is None
    assert "more than the 2 that parity covers" in row(rot)["drill"]["problem"]


def test_without_parity_nothing_is_proven() -> None:
    rot = RestingCluster(nodes=2, parity=0, period_s=0)
    ask(rot)
    assert "parity is 0" in row(rot)["drill"]["problem"]
    assert row(rot)["drill"]["proven_step"] is None
    assert rot.chunks(0)[0] == Resting("data", 0)
