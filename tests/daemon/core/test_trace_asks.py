"""Who is asked for a trace, through whom, and what is said of those who don't answer. In the simulator: its clocks
differ by hours and its network takes its time, and both are known."""

import pytest
from holdfast.cli.clocks import offset
from holdfast.protocol import limits
from holdfast.protocol.trace import AskTrace, TraceAnswer
from sim.cluster import Cluster, ClusterShape
from sim.network import NetworkFaults
from sim.ranks import JobShape


@pytest.fixture
def cluster() -> Cluster:
    """Six nodes in two groups: most nodes don't talk to one another."""
    jobs = (JobShape("a", tuple((node, 100) for node in range(6)), every=1, step_s=0.5),)
    network = NetworkFaults(delay_s=0.001, delay_s_max=0.02)
    made = Cluster(3, ClusterShape(node_count=6, parity=1, group_size=3, jobs=jobs, network=network))
    made.start()
    job = made.jobs[0]
    assert made.world.run_until(lambda: job.committed is not None and job.committed.step >= 1, deadline_s=60.0)
    return made


def ask(cluster: Cluster, asker: int, node: int, newest: int = 1) -> TraceAnswer:
    heard = cluster.command(asker, AskTrace(7, node, newest))
    assert cluster.world.run_until(lambda: bool(heard), deadline_s=cluster.world.now_s + 10)
    (answer,) = heard
    assert isinstance(answer, TraceAnswer)
    assert (answer.request, answer.node) == (7, node)
    return answer


def test_every_node_is_reached_from_every_node_and_its_clock_lies_within_the_bounds(cluster: Cluster) -> None:
    widths = []
    for asker in (0, 5):
        for node in range(6):
            answers = [ask(cluster, asker, node) for _ in range(3)]
            found = offset(answers)
            assert found is not None
            ahead_ns = cluster.machines[node].clock_offset_ns - cluster.machines[asker].clock_offset_ns
            assert abs(found.ahead_ns - ahead_ns) <= found.error_ns
            assert all(answer.trace is not None and answer.trace.spans for answer in answers)
            widths.append(found.error_ns)
    assert widths[0] == widths[-1] == 0, "a node that is asked for itself"
    assert 0 < max(widths) < 10**9


def test_who_is_gone_is_said_to_be_and_nothing_is_left_open(cluster: Cluster) -> None:
    cluster.machines[4].lose()
    told = ask(cluster, 5, 4)  # asked, or said to be silent: the daemon may not have noticed yet
    assert told.trace is None
    assert told.problem in {"nothing is heard from it", f"no answer within {limits.TRACE_PATIENCE_S} s"}
    cluster.world.run_until(lambda: False, deadline_s=cluster.world.now_s + 2 * limits.PEER_DEADLINE_S)
    assert ask(cluster, 5, 4).problem == "nothing is heard from it"
    assert ask(cluster, 1, 4).problem == "nothing is heard from it", "the collector knows"
    assert ask(cluster, 5, 4000).problem == "this cluster has 6 nodes"
    for machine in cluster.machines:
        if machine.worker is not None:
            assert machine.worker.node.trace_asks.waiting == {}


def test_a_command_that_went_away_leaves_nothing_open(cluster: Cluster) -> None:
    worker = cluster.machines[5].worker
    assert worker is not None
    client = worker.attach(lambda _: None, lambda: None)
    worker.said(client, AskTrace(1, 0, 1))
    assert cluster.world.run_until(lambda: bool(worker.node.trace_asks.waiting), deadline_s=cluster.world.now_s + 5)
    worker.drop_client(client)
    assert worker.node.trace_asks.waiting == {}
