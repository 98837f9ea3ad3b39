"""Who asks for the status while the collector dies hears of that as soon as it is known, not a deadline later."""

from holdfast.protocol import limits, messages
from sim.cluster import Cluster, ClusterShape
from sim.machine import TICK_S
from sim.network import NetworkFaults


def test_a_status_that_was_asked_of_a_dead_collector_is_answered_once_it_is_down() -> None:
    network = NetworkFaults(delay_s=0.001, delay_s_max=0.001)
    cluster = Cluster(1, ClusterShape(node_count=3, parity=1, group_size=3, jobs=(), network=network))
    world = cluster.world
    cluster.start()
    world.run_until(lambda: False, deadline_s=5.0)
    cluster.machines[0].lose()
    worker = cluster.machines[1].worker
    assert worker is not None
    peers = worker.node.peers
    heard: list[list[messages.DaemonMessage]] = []
    while peers.alive(0):  # somebody looks four times a second
        heard.append(cluster.command(1, messages.AskStatus()))
        world.run_until(lambda: not peers.alive(0), deadline_s=world.now_s + TICK_S)
    world.run_until(lambda: bool(heard[-1]), deadline_s=world.now_s + TICK_S)
    assert world.now_s < 5.0 + limits.PEER_DEADLINE_S + 2 * TICK_S
    assert heard[-1], "it was asked just before the collector was known to be down"
    answer = heard[-1][0]
    assert isinstance(answer, messages.StatusAnswer)
    assert answer.status["nodes"][0]["state"] == "down"
