"""When a durable copy is made, by whom, what a failure costs, and what a stop waits for."""

from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
from holdfast.daemon.core.actions import CopyDurably
from holdfast.daemon.core.context import Context
from holdfast.daemon.core.durable import Durable
from holdfast.daemon.core.job import Job
from holdfast.daemon.core.peers import Peers
from holdfast.protocol import limits
from holdfast.protocol.config import ClusterConfig, NodeConfig
from holdfast.protocol.health import DurableReport
from holdfast.protocol.ids import SnapshotId
from sim.cluster import Cluster, ClusterShape
from sim.network import NetworkFaults
from sim.ranks import JobShape

NODES = tuple(NodeConfig(name=f"n{n}", host="h", port=n + 1, domain=f"d{n}") for n in range(2))
CONFIG = ClusterConfig(cluster_name="c", nodes=NODES, parity=1, durable_dir="/copies", durable_every_s=100)


@dataclass
class Told:
    durable: DurableReport


@dataclass
class OtherNodes:
    """What the table of peers says."""

    collector: int = 0
    settled: bool = True
    told: DurableReport | None = None

    def reports(self, job: str) -> dict[int, Told]:
        del job
        return {} if self.told is None else {1: Told(self.told)}


@dataclass
class OneJob:
    name: str = "gpt"
    committed: SnapshotId | None = None


class Machine:
    def __init__(self, **changes: Any) -> None:
        config = replace(CONFIG, **changes)
        self.ctx = Context(
            config=config, config_digest="", placement=config.placement(), node=0, incarnation=1, worker_session=1,
            budget_bytes=1,
        )  # fmt: skip
        self.peers, self.job = OtherNodes(), OneJob()
        self.durable = Durable(self.ctx, cast("Peers", self.peers))
        self.jobs = cast("list[Job]", [self.job])

    def at(self, seconds: float, step: int | None = None) -> list[CopyDurably]:
        self.ctx.now_ns = int(seconds * 1e9)
        if step is not None:
            self.job.committed = SnapshotId(1, step)
        self.durable.tick(self.jobs)
        ordered = [action for action in self.ctx.actions if isinstance(action, CopyDurably)]
        self.ctx.actions.clear()
        return ordered

    def done(self) -> None:
        assert self.job.committed is not None
        self.durable.copied("gpt", self.job.committed, size_bytes=10, seconds=1.0)

    def holds_up(self, seconds: float) -> bool:
        self.at(seconds)
        return self.durable.holds_up(self.jobs)


def test_the_first_commit_is_copied_at_once_and_further_ones_when_the_time_has_passed() -> None:
    machine = Machine()
    assert machine.at(1) == []
    assert machine.at(2, step=5) == [CopyDurably("gpt", "/copies", 2)]
    assert machine.at(3, step=6) == []  # one at a time
    machine.done()
    assert machine.at(50, step=7) == []
    assert machine.at(104, step=7) != []
    machine.done()
    assert machine.at(1000) == []  # nothing newer is committed
    assert machine.durable.report("gpt").copied == SnapshotId(1, 7)
    assert machine.durable.report("gpt").age_s == pytest.approx(896)


def test_steps_make_a_copy_due_too_also_where_they_began_anew() -> None:
    machine = Machine(durable_every_s=0, durable_every_steps=10)
    machine.at(1, step=50)
    machine.done()
    assert machine.at(2, step=59) == []
    assert machine.at(3, step=60) != []
    machine.done()
    assert machine.at(4, step=20) != []


def test_nobody_copies_who_is_not_the_collector_or_was_not_told_where() -> None:
    machine = Machine()
    machine.peers.collector = 1
    assert machine.at(1, step=5) == []
    machine.peers.collector, machine.peers.settled = 0, False
    assert machine.at(2) == []
    assert Machine(durable_dir=None).at(1, step=5) == []
    assert Machine(durable_every_s=0).at(1, step=5) == []


def test_a_failure_is_said_and_tried_again_ever_later_up_to_a_limit() -> None:
    machine = Machine()
    now_s, pauses = 1.0, []
    assert machine.at(now_s, step=5) != []
    for _ in range(10):
        machine.durable.failed("gpt", "the disk is full")
        began_s = now_s
        while not machine.at(now_s):
            now_s += 1
        pauses.append(now_s - began_s)
    assert pauses[:3] == [limits.COPY_RETRY_S, 2 * limits.COPY_RETRY_S, 4 * limits.COPY_RETRY_S]
    assert pauses[-1] == limits.COPY_RETRY_S_MAX
    assert (machine.durable.report("gpt").failures, machine.durable.report("gpt").problem) == (10, "the disk is full")
    machine.done()
    assert (machine.durable.report("gpt").failures, machine.durable.report("gpt").problem) == (0, "")


def test_a_successor_goes_on_from_what_the_collector_told() -> None:
    machine = Machine()
    machine.peers.collector, machine.peers.told = 1, DurableReport(copied=SnapshotId(1, 5), age_s=40.0)
    machine.at(50, step=6)
    machine.peers.collector, machine.peers.told = 0, None
    assert machine.at(109) == []
    assert machine.at(111) != []


def test_the_collector_stops_once_what_is_committed_is_copied_and_the_others_have_heard() -> None:
    machine = Machine(durable_every_s=0)
    assert machine.at(1, step=5) == []
    machine.durable.stop()
    assert machine.durable.holds_up(machine.jobs)
    assert machine.at(2) != []
    assert machine.holds_up(3)
    machine.done()
    assert machine.holds_up(3.1)
    assert not machine.holds_up(3.1 + limits.HEARTBEAT_S)


def test_a_stop_does_not_wait_for_a_directory_that_can_not_be_written_nor_beyond_its_grace() -> None:
    machine = Machine(durable_every_s=0)
    machine.at(1, step=5)
    machine.durable.stop()
    machine.at(2)
    assert machine.holds_up(3)
    machine.durable.failed("gpt", "read-only")
    assert not machine.holds_up(4)
    assert not machine.holds_up(3 + 2 * limits.COPY_RETRY_S)  # and not for another try either
    slow = Machine()
    slow.at(1, step=5)
    slow.durable.stop()
    assert slow.holds_up(20)
    assert not slow.holds_up(21.5)
    none = Machine(durable_grace_s=0)
    none.at(1, step=5)
    none.durable.stop()
    assert not none.holds_up(1)


def test_another_node_stays_while_the_collector_copies() -> None:
    machine = Machine()
    machine.peers.collector = 1
    machine.at(1, step=5)
    assert not machine.durable.holds_up(machine.jobs)  # nobody asked it to stop
    machine.durable.stop()
    assert machine.holds_up(2)  # it may not have heard yet
    machine.peers.told = DurableReport(running=True)
    assert machine.holds_up(9)
    machine.peers.told = DurableReport(copied=SnapshotId(1, 5))
    assert not machine.holds_up(10)


def test_in_a_cluster_copies_go_on_when_tries_fail_and_the_collector_is_lost() -> None:
    shape = ClusterShape(
        node_count=3,
        parity=1,
        group_size=3,
        jobs=(JobShape("a", ((1, 100), (2, 65)), step_s=1.0),),
        network=NetworkFaults(delay_s=0.001, delay_s_max=0.001),
    )
    cluster = Cluster(1, shape)
    object.__setattr__(cluster.config, "durable_dir", "/copies")
    object.__setattr__(cluster.config, "durable_every_steps", 2)
    cluster.start()
    world = cluster.world

    def known(node: int) -> SnapshotId:
        worker = cluster.machines[node].worker
        parts = worker.node.jobs.get("a") if worker is not None else None
        told = worker.node.durable.report("a").copied if worker is not None and parts is not None else None
        return told or SnapshotId(0, 0)

    assert world.run_until(lambda: all(known(node).step >= 5 for node in range(3)), deadline_s=120.0)
    before = known(1)
    cluster.lose_memory(0, back_after_s=8.0)
    assert world.run_until(lambda: known(1).step > before.step + 4, deadline_s=world.now_s + 120.0)
    assert world.run_until(lambda: known(0) == known(1) == known(2), deadline_s=world.now_s + 30.0)
