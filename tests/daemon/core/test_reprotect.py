"""Nodes stay away: when the others make up for them, with which memory, and when that is free again."""

from typing import Any

from holdfast.daemon.core.memory import ESTATE_SLOTS_FROM, READ_SLOTS_FROM
from holdfast.daemon.core.reprotect import Reprotect
from holdfast.protocol import messages
from sim.cluster import Cluster, ClusterShape
from sim.network import NetworkFaults
from sim.ranks import JobShape
from sim.readers import Reader

AFTER_S = 6
DEADLINE_S = 60.0


class Scene:
    """A cluster of one group whose job has committed and ended."""

    def __init__(self, *, nodes: int = 4, parity: int = 1, after_s: int = AFTER_S, budget_bytes: int = 1 << 20) -> None:
        shape = ClusterShape(
            node_count=nodes,
            parity=parity,
            group_size=nodes,
            jobs=(JobShape("a", tuple((node, 300 + 64 * node) for node in range(nodes)), step_s=1.0),),
            budget_bytes=budget_bytes,
            network=NetworkFaults(delay_s=0.001, delay_s_max=0.002),
            coding_s_max=0.001,
            reprotect_after_s=after_s,
        )
        self.cluster = Cluster(3, shape)
        self.cluster.start()
        self.until(lambda: self.cluster.jobs[0].committed is not None)
        self.cluster.jobs[0].stopped = True
        self.cluster.jobs[0].kill("it ends")
        self.wait(3.0)

    def wait(self, seconds: float) -> None:
        self.cluster.world.run_until(lambda: False, deadline_s=self.cluster.world.now_s + seconds)

    def until(self, done: Any) -> None:
        world = self.cluster.world
        assert world.run_until(done, deadline_s=world.now_s + DEADLINE_S), world.transcript[-20:]

    def part(self, node: int) -> Reprotect:
        worker = self.cluster.machines[node].worker
        assert worker is not None
        return worker.node.jobs["a"].reprotect

    def absent(self, node: int) -> list[tuple[int, ...]]:
        return [held.absent for held in self.part(node).job.estates]

    def pieces(self, node: int) -> int:
        return sum(ESTATE_SLOTS_FROM <= memory.slot < READ_SLOTS_FROM for memory in self.cluster.machines[node].held)

    def row(self, node: int) -> dict[str, Any]:
        worker = self.cluster.machines[node].worker
        assert worker is not None
        status: Any = worker.node.status()
        return dict(status["jobs"][0])

    def made_up(self, *absent: int) -> None:
        """Until all that are left keep their parts, and have heard so of each other."""
        heirs = [machine.node for machine in self.cluster.machines if machine.worker is not None]
        self.until(lambda: all(absent in self.absent(node) for node in heirs))
        self.wait(2.0)

    def read_all(self, node: int) -> None:
        reader = Reader(self.cluster.world, self.cluster.machines, self.cluster.truth, "a", node, whole=True)
        self.until(lambda: reader.done)
        assert reader.bytes_read == sum(size for _, size in self.cluster.jobs[0].shape.shards)


def test_nothing_is_done_before_the_time_that_was_set_and_nothing_at_all_without_one() -> None:
    scene, never = Scene(), Scene(after_s=0)
    for one in (scene, never):
        one.cluster.lose_node(3, back_after_s=None)
    scene.wait(AFTER_S)
    assert [scene.pieces(node) for node in range(3)] == [0, 0, 0]
    assert scene.row(0)["more_losses"] == 0
    assert scene.row(0)["reprotection"] is None
    scene.made_up(3)
    never.wait(60.0)
    assert [never.pieces(node) for node in range(3)] == [0, 0, 0]
    assert never.row(0)["verdict"] == "UNPROTECTED"


def test_tolerance_comes_back_and_the_status_says_so() -> None:
    scene = Scene()
    scene.cluster.lose_node(3, back_after_s=None)
    scene.made_up(3)
    row = scene.row(0)
    assert row["more_losses"] == 1
    assert row["verdict"] == "DEGRADED"
    assert row["reason"] == "n3 lost: 1 more can be lost; the others made up for n3"
    assert row["reprotection"] == {
        "nodes": ["n3"], "kept_by": ["n0", "n1", "n2"], "state": "done", "done_chunks": 0, "total_chunks": 0,
        "problem": "",
    }  # fmt: skip


def test_the_nodes_go_one_after_the_other_and_the_last_one_still_has_every_byte() -> None:
    scene = Scene()
    for lost, absent in ((3, (3,)), (0, (0, 3))):
        scene.cluster.lose_node(lost, back_after_s=None)
        scene.made_up(*absent)
    scene.cluster.lose_node(2, back_after_s=None)
    scene.wait(5.0)
    scene.read_all(1)
    for node in (0, 2, 3):
        scene.cluster.replace_node(node)
    scene.until(lambda: all(scene.cluster.is_whole(node) for node in range(4)))
    scene.until(lambda: scene.pieces(1) == 0)
    assert scene.row(1)["reprotection"] is None
    assert scene.row(1)["more_losses"] == 1
    assert scene.cluster.truth.estates.checked == 5


def test_without_memory_nothing_is_made_up_for_and_the_numbers_are_said() -> None:
    needed = Scene()
    budget_bytes = max(sum(held.held_bytes for held in m.held.values()) for m in needed.cluster.machines)
    scene = Scene(budget_bytes=budget_bytes + 100)
    scene.cluster.lose_node(3, back_after_s=None)
    scene.wait(AFTER_S + 5.0)
    row = scene.row(0)
    assert row["more_losses"] == 0
    assert row["reprotection"]["state"] == "failed"
    assert "no memory to make up for n3: needed" in row["reason"]
    scene.cluster.replace_node(3)  # nobody is away any more: nothing is missing
    scene.until(lambda: scene.row(0)["reprotection"] is None and scene.row(0)["verdict"] == "HEALTHY")


def test_a_worker_takes_up_the_part_of_its_predecessor() -> None:
    scene = Scene()
    scene.cluster.lose_node(3, back_after_s=None)
    scene.made_up(3)
    before = scene.part(1).job.estates[0]
    scene.cluster.machines[1].crash_worker()
    scene.cluster.machines[1].boot()
    assert scene.part(1).job.estates == [before]
    scene.wait(5.0)
    scene.cluster.lose_node(2, back_after_s=None)
    scene.wait(5.0)
    scene.read_all(1)


def test_a_part_that_was_being_computed_is_computed_anew() -> None:
    scene = Scene()
    scene.cluster.lose_node(3, back_after_s=None)

    def half() -> bool:
        building = scene.part(1).building
        return building is not None and 0 < len(building.digests) - building.digests.count(None) < len(building.digests)

    scene.until(half)
    scene.cluster.machines[1].crash_worker()
    scene.cluster.machines[1].boot()
    assert scene.pieces(1) == 0
    assert scene.part(1).job.estates == []
    scene.made_up(3)
    assert scene.row(0)["more_losses"] == 1


def test_a_node_that_was_cut_off_counts_with_what_it_holds_and_frees_what_was_kept_for_it() -> None:
    scene = Scene(parity=2)
    scene.cluster.partition({3}, seconds=AFTER_S + 20.0, one_way=False)
    scene.until(lambda: all(scene.absent(node) == [(3,)] for node in range(3)) or scene.row(0)["more_losses"] == 2)
    assert scene.absent(3) == []  # alone it could protect nothing
    scene.wait(AFTER_S + 25.0)
    assert [scene.pieces(node) for node in range(4)] == [0] * 4
    assert scene.row(0)["more_losses"] == 2


def test_two_halves_make_up_for_each_other_and_both_are_right() -> None:
    scene = Scene(parity=2)
    scene.cluster.partition({0, 1}, seconds=AFTER_S + 20.0, one_way=False)
    scene.wait(AFTER_S + 10.0)
    assert [scene.absent(node) for node in range(4)] == [[(2, 3)], [(2, 3)], [(0, 1)], [(0, 1)]]
    assert scene.cluster.truth.estates.checked == 4
    scene.read_all(0)
    scene.read_all(3)
    scene.wait(20.0)
    assert [scene.pieces(node) for node in range(4)] == [0] * 4
    assert scene.row(2)["verdict"] == "HEALTHY"


def test_a_plan_that_needs_the_memory_has_it() -> None:
    scene = Scene()
    scene.cluster.lose_node(3, back_after_s=None)
    scene.made_up(3)
    part = scene.part(0)
    assert part.give_way()
    assert part.job.estates == []
    assert not part.give_way()


def test_a_forgotten_job_leaves_nothing() -> None:
    scene = Scene()
    scene.cluster.lose_node(3, back_after_s=None)
    scene.made_up(3)
    scene.cluster.truth.forget("a")
    scene.cluster.command(0, messages.AskForget("a"))
    scene.wait(3.0)
    assert [scene.cluster.machines[node].held for node in range(3)] == [{}, {}, {}]
