"""Who counts as alive: a dead node's last words, read late, do not bring it back; a node that speaks on is back.

And who is a node, where two machines claim to be.
"""

import pytest
from holdfast.daemon.core import actions, events
from holdfast.daemon.core.node import Node
from holdfast.daemon.core.peer_side import PeerSide
from holdfast.protocol import limits, messages
from sim.cluster import Cluster, ClusterShape
from sim.machine import Worker
from sim.network import NetworkFaults

LATE_S = 2 * limits.PEER_DEADLINE_S
DELAY_S = 0.001


class Scene:
    """Three nodes that hear each other; what node 2 says to node 0 can be held back."""

    def __init__(self) -> None:
        network = NetworkFaults(delay_s=DELAY_S, delay_s_max=DELAY_S)
        self.cluster = Cluster(1, ClusterShape(node_count=3, parity=1, group_size=3, jobs=(), network=network))
        self.world = self.cluster.world
        self.cluster.start()
        self.wait(5.0)
        self.words: list[events.PeerSaid] = []

    def wait(self, seconds: float) -> None:
        self.world.run_until(lambda: False, deadline_s=self.world.now_s + seconds)

    def worker(self, node: int) -> Worker:
        worker = self.cluster.machines[node].worker
        assert worker is not None
        return worker

    def node(self) -> Node:
        return self.worker(0).node

    def rival_speaks(self) -> list[actions.Action]:
        """Another machine claims to be node 2, under a higher incarnation; returns what node 0 does about it."""
        beat = self.worker(1).node.peers.table[2].heartbeat
        assert beat is not None
        said = events.PeerSaid(2, self.cluster.machines[2].incarnation + 1000, beat)
        return self.node().handle(said, self.cluster.machines[0].clock_ns)

    def die_with_last_words(self) -> None:
        """Node 2 dies; heartbeats of its last seconds are still on their way to node 0."""
        beat = self.node().peers.table[2].heartbeat
        assert beat is not None
        self.words = [events.PeerSaid(2, self.cluster.machines[2].incarnation, beat)] * 3
        self.cluster.machines[2].lose()
        self.wait(LATE_S)
        assert not self.node().peers.alive(2)


def refusal(decided: list[actions.Action]) -> str:
    """What a peer is told that is refused; empty if none is."""
    told = [action.message for action in decided if isinstance(action, actions.SendPeer)]
    return "".join(message.text for message in told if isinstance(message, messages.Refused))


def test_last_words_that_are_read_late_do_not_bring_a_dead_node_back() -> None:
    scene = Scene()
    scene.die_with_last_words()
    for word in scene.words:
        scene.worker(0).handle(word)
        scene.wait(limits.LAST_WORDS_S / 4)
        assert not scene.node().peers.alive(2)
    assert scene.node().status()["nodes"][2]["state"] == "down"  # type: ignore[index]  # a list of rows


def test_late_words_in_two_bursts_long_apart_do_not_either() -> None:
    scene = Scene()
    scene.die_with_last_words()
    for word in scene.words[:2]:
        scene.worker(0).handle(word)
        assert not scene.node().peers.alive(2)
        scene.wait(LATE_S)


def test_a_node_that_was_cut_off_is_back_once_it_speaks_on() -> None:
    scene = Scene()
    scene.cluster.partition({2}, seconds=LATE_S, one_way=False)
    scene.wait(LATE_S)
    assert not scene.node().peers.alive(2)
    scene.wait(3 * limits.HEARTBEAT_S)
    assert scene.node().peers.alive(2)


@pytest.mark.parametrize("lost", [True, False], ids=["replacement", "worker"])
def test_another_process_in_the_slot_counts_at_its_first_word(lost: bool) -> None:
    scene = Scene()
    machine = scene.cluster.machines[2]
    if lost:
        machine.lose()
    else:
        machine.crash_worker()
    scene.wait(LATE_S)
    assert not scene.node().peers.alive(2)
    machine.boot()
    peer = scene.node().peers.table[2]
    before = (peer.incarnation, peer.worker_session)
    until_s = scene.world.now_s + 2 * limits.HEARTBEAT_S
    assert scene.world.run_until(lambda: (peer.incarnation, peer.worker_session) > before, deadline_s=until_s)
    assert scene.node().peers.alive(2)


@pytest.mark.parametrize("restarts", [False, True], ids=["long-lived", "restarted"])
def test_a_node_that_is_alive_is_not_replaced(restarts: bool) -> None:
    scene = Scene()
    known = scene.cluster.machines[2].incarnation
    if restarts:  # and hears the rival before the one that it knows
        scene.cluster.machines[0].crash_worker()
        scene.cluster.machines[0].boot()
        assert not scene.node().peers.alive(2)
    assert f"has to wait until {known}" in refusal(scene.rival_speaks())
    scene.wait(LATE_S)
    assert f"has to wait until {known}" in refusal(scene.rival_speaks())
    assert scene.node().peers.alive(2)
    assert scene.node().peers.table[2].incarnation == known


def test_a_node_that_begins_and_hears_the_rival_first_believes_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PeerSide, "_holds_anything", lambda _: True)  # so the present one keeps its number
    scene = Scene()
    known = scene.cluster.machines[2].incarnation
    scene.cluster.machines[0].lose()
    scene.wait(LATE_S)
    scene.cluster.machines[0].boot()
    assert not refusal(scene.rival_speaks())
    assert scene.node().peers.table[2].incarnation > known
    peer = scene.node().peers.table[2]
    assert scene.world.run_until(lambda: peer.incarnation == known, deadline_s=scene.world.now_s + LATE_S)
    assert scene.node().peers.alive(2)
    assert refusal(scene.rival_speaks())


def test_a_node_that_is_silent_is_replaced_and_is_refused_from_then_on() -> None:
    scene = Scene()
    known = scene.cluster.machines[2].incarnation
    scene.cluster.partition({2}, seconds=LATE_S, one_way=False)
    scene.wait(limits.PEER_DEADLINE_S - limits.HEARTBEAT_S)
    assert refusal(scene.rival_speaks())
    scene.wait(2 * limits.HEARTBEAT_S)
    assert not refusal(scene.rival_speaks())
    assert scene.node().peers.table[2].incarnation > known
    scene.wait(LATE_S)
    assert not scene.node().peers.takes(2, known)
    assert scene.node().peers.table[2].incarnation > known


def test_of_two_that_claim_to_be_a_node_the_log_speaks_now_and_then_and_the_present_one_is_not_called_refused() -> None:
    scene = Scene()
    lines: list[str] = []
    for _ in range(int(limits.REFUSAL_PAUSE_S / limits.HEARTBEAT_S) - 1):
        lines += [action.text for action in scene.rival_speaks() if isinstance(action, actions.Log)]
        assert scene.node().peers.table[2].refused == ""
        scene.wait(limits.HEARTBEAT_S)
    assert len(lines) == 1
    assert "stop the daemon that is not to be n2" in lines[0]
