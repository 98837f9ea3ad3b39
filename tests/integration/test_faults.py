"""Processes that die, freeze or come late: what is committed stays, what is not is not offered, training goes on."""

import contextlib
import os
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from holdfast.client import Snapshotter
from holdfast.client.errors import HoldfastError, NotRecoverableError
from holdfast.client.snapshotter import PLAN_RETRY_STEPS
from local_cluster import DEADLINE_S, LocalCluster, alive, job_row, until
from rank_process import RankProcess

MakeCluster = Callable[..., LocalCluster]
MakeRank = Callable[..., RankProcess]
SIZE = 300_000  # int64 elements: 2.4 MB, 37 chunks of 64 KiB


def content(step: int) -> torch.Tensor:
    return torch.arange(SIZE) * (step + 1)


class Trainer:
    """A training process, as objects of this one: a state, and what protects it."""

    def __init__(
        self, cluster: LocalCluster, job: str, *, node: int = 0, strict: bool = True, stall_s: float = 10
    ) -> None:
        self.state = torch.zeros(SIZE, dtype=torch.int64)
        self.snapshotter = Snapshotter({"state": self.state}, job=job, socket=cluster.socket(node), max_stall_s=stall_s,
                                       on_error="raise" if strict else "warn")  # fmt: skip

    def step(self, step: int) -> None:
        self.snapshotter.before_update()
        self.state.copy_(content(step))
        self.snapshotter.step(step)

    def commit(self, step: int) -> None:
        self.step(step)
        self.snapshotter.wait(timeout_s=DEADLINE_S)

    def restore(self) -> int | None:
        """Restore over garbage; what comes must be the bytes of that step."""
        self.state.fill_(-1)
        step = self.snapshotter.restore()
        if step is not None:
            assert torch.equal(self.state, content(step)), f"other bytes than those of step {step}"
        return step

    def commit_in_time(self, first: int) -> int:
        """Step until something commits, which it must within the deadline; returns that step."""

        def look() -> int | None:
            nonlocal first
            first += 1
            self.step(first)
            try:
                self.snapshotter.wait(timeout_s=1)
            except HoldfastError:
                return None
            return first

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            return until(look, "a commit") or 0

    def vanish(self) -> None:
        """End as a killed process does: without a word."""
        self.snapshotter._stager.stop(timeout_s=5)
        self.snapshotter._closed = True


def test_a_frozen_worker_costs_snapshots_and_nothing_else(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(nodes=3, parity=1)
    cluster.start()
    trainer = Trainer(cluster, "job", strict=False)
    trainer.commit(0)
    cluster.signal_worker(1, signal.SIGSTOP)
    started_s, step = time.monotonic(), 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        while cluster.status()["nodes"][1]["state"] == "up":
            step += 1
            trainer.step(step)
        for _ in range(3):  # known to be down: refused at once, not waited for
            step += 1
            trainer.step(step)
        trainer.snapshotter.before_update()
    assert time.monotonic() - started_s < 15, "training was held up"
    assert any("nothing can commit while n1" in str(warning.message) for warning in caught), [
        str(w.message) for w in caught
    ]
    assert job_row(cluster.status(), "job")["committed_step"] == 0
    assert cluster.status(2)["verdict"] != "HEALTHY"
    cluster.signal_worker(1, signal.SIGCONT)
    committed = trainer.commit_in_time(step)
    trainer.snapshotter.close()
    assert Trainer(cluster, "job").restore() == committed


def test_two_jobs_do_not_see_each_other(cluster: LocalCluster) -> None:
    first, second = Trainer(cluster, "first"), Trainer(cluster, "second")
    for step in range(3):
        first.commit(step)
        second.commit(step + 10)
    first.snapshotter.close()
    second.snapshotter.close()
    again = [Trainer(cluster, "first"), Trainer(cluster, "second")]
    assert [trainer.restore() for trainer in again] == [2, 12]
    again[0].snapshotter.close()
    cluster.forget("first")
    again[1].commit(13)
    again[1].snapshotter.close()
    fresh = Trainer(cluster, "first")
    assert fresh.restore() is None
    fresh.snapshotter.close()
    last = Trainer(cluster, "second")
    assert last.restore() == 13
    last.snapshotter.close()
    cluster.forget("first")
    cluster.forget("second")


def test_a_rank_killed_in_mid_copy(cluster: LocalCluster, make_rank: MakeRank) -> None:
    rank = make_rank(socket=cluster.socket(0), job="torn")
    rank.done("step", step=0)
    rank.done("wait")
    rank.tell("die_in_copy", step=1)
    assert rank.process.wait(DEADLINE_S) == -signal.SIGKILL
    cluster.wait_status(lambda s: job_row(s, "torn")["ranks"] == 0, "the daemon sees the end")
    assert job_row(cluster.status(), "torn")["committed_step"] == 0
    again = make_rank(socket=cluster.socket(0), job="torn")
    assert again.done("restore") == 0
    assert again.done("equal", step=0)
    again.done("step", step=1)
    again.done("wait")
    again.done("close")
    cluster.forget("torn")


def test_a_rank_killed_with_all_its_bytes_sealed(cluster: LocalCluster, make_rank: MakeRank) -> None:
    """A sealed snapshot goes on without its rank: either it commits, or it is not offered."""
    rank = make_rank(socket=cluster.socket(0), job="sealed", size_bytes=8 << 20)
    rank.done("step", step=0)
    rank.done("wait")
    rank.done("step", step=1)
    rank.kill()
    again = make_rank(socket=cluster.socket(0), job="sealed", size_bytes=8 << 20)
    restored = again.done("restore")
    assert restored in {0, 1}
    assert again.done("equal", step=restored)
    again.done("close")
    cluster.forget("sealed")


def test_a_worker_killed_while_it_protects(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(nodes=2, parity=1)
    cluster.start()
    trainer = Trainer(cluster, "job", strict=False)
    trainer.commit(0)
    cluster.signal_worker(1, signal.SIGSTOP)  # holds the protection of step 1 open
    trainer.step(1)
    until(lambda: trainer.snapshotter.stats()["sealed_step"] == 1, "step 1 is sealed")
    cluster.kill_worker(0)
    cluster.signal_worker(1, signal.SIGCONT)
    cluster.wait_up()
    # Node 0 holds no parity of its own image, so it may have stated its fact already, and then it keeps its word.
    assert job_row(cluster.status(), "job")["committed_step"] in {0, 1}
    # The trainer, which lives, goes on by itself.
    assert trainer.commit_in_time(1) > 1
    newest = trainer.snapshotter.stats()["committed_step"]
    trainer.vanish()
    again = Trainer(cluster, "job")
    assert again.restore() == newest
    again.snapshotter.close()


@pytest.mark.parametrize("node", [0, 1], ids=["own", "peer"])
def test_a_worker_killed_at_rest_loses_nothing(make_cluster: MakeCluster, node: int) -> None:
    cluster = make_cluster(nodes=2, parity=1)
    cluster.start()
    trainer = Trainer(cluster, "job", strict=False)
    trainer.commit(0)
    trainer.commit(1)
    cluster.kill_worker(node)
    for looker in (0, 1):
        cluster.wait_status(lambda s: s["nodes"][node]["worker_session"] == 2, "the successor is met", node=looker)
    cluster.wait_status(lambda s: s["verdict"] == "HEALTHY", "nothing is lost")
    committed = trainer.commit_in_time(1)
    trainer.vanish()
    again = Trainer(cluster, "job")
    assert again.restore() == committed
    again.snapshotter.close()


def test_a_keeper_killed_and_then_its_worker(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(nodes=2, parity=1)
    cluster.start()
    trainer = Trainer(cluster, "job", strict=False)
    trainer.commit(0)
    keeper, worker = cluster.keeper(0), cluster.worker(0)
    os.kill(keeper, signal.SIGKILL)
    until(lambda: not alive(keeper), "the keeper is dead")
    cluster.keepers[0].wait(DEADLINE_S)
    cluster.wait_log(0, "a new one holds")
    assert cluster.keeper(0) != keeper
    assert cluster.worker(0) == worker
    trainer.commit(1)  # nobody noticed
    cluster.kill_worker(0)
    seen = cluster.wait_status(lambda s: s["nodes"][0]["worker_session"] == 2, "the successor reads the ledger")
    assert seen["nodes"][0]["jobs"]["job"]["whole"], seen  # from the new keeper's hands, not rebuilt from parity
    cluster.wait_up()
    trainer.vanish()
    again = Trainer(cluster, "job")
    assert again.restore() == 1
    again.commit(2)
    again.snapshotter.close()


def test_a_worker_stopped_on_purpose_ends_a_keeper_that_it_had_brought_back(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(nodes=1, parity=0)
    cluster.start()
    keeper, worker = cluster.keeper(0), cluster.worker(0)
    os.kill(keeper, signal.SIGKILL)
    until(lambda: not alive(keeper), "the keeper is dead")
    cluster.keepers[0].wait(DEADLINE_S)
    cluster.wait_log(0, "a new one holds")
    keeper = cluster.keeper(0)
    os.kill(worker, signal.SIGTERM)
    until(lambda: not alive(keeper), "the keeper ends with its worker")
    assert not cluster.processes(0)


def test_sigterm_ends_a_node_and_leaves_nothing(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(nodes=1, parity=0)
    cluster.start()
    trainer = Trainer(cluster, "job", strict=False)
    trainer.commit(0)
    os.kill(cluster.keeper(0), signal.SIGTERM)
    assert cluster.keepers[0].wait(DEADLINE_S) == 0
    until(lambda: not cluster.processes(0), "no process is left")
    assert not list(cluster.folder.glob("*.sock*zmq")), list(cluster.folder.iterdir())
    trainer.vanish()


def test_no_daemon_at_all_then_one_appears(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(nodes=1, parity=0)
    trainer = Trainer(cluster, "late", strict=False, stall_s=1.0)
    started_s = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert trainer.restore() is None
        for step in range(PLAN_RETRY_STEPS - 5):
            trainer.snapshotter.step(step)
    took_s = time.monotonic() - started_s
    assert took_s < 2.5, f"max_stall_s is 1 s, training was held up for {took_s} s"
    assert len([w for w in caught if "unprotected" in str(w.message)]) == 1, [str(w.message) for w in caught]
    cluster.start()
    for step in range(PLAN_RETRY_STEPS - 5, PLAN_RETRY_STEPS + 5):
        trainer.step(step)
    trainer.snapshotter.wait(timeout_s=DEADLINE_S)
    assert trainer.snapshotter.stats()["committed_step"] == PLAN_RETRY_STEPS + 4
    trainer.snapshotter.close()


def test_a_node_restarted_in_mid_run_is_met_again(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(nodes=2, parity=1)
    cluster.start()
    trainer = Trainer(cluster, "job", strict=False)
    trainer.commit(0)
    cluster.kill(0)
    cluster.start([0])
    committed = trainer.commit_in_time(0)
    trainer.snapshotter.close()
    again = Trainer(cluster, "job")
    assert again.restore() == committed
    again.snapshotter.close()


def test_as_many_nodes_as_parity_are_lost_and_rebuilt(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(nodes=4, parity=2)
    cluster.start()
    trainer = Trainer(cluster, "job")
    trainer.commit(0)
    trainer.commit(1)
    trainer.vanish()
    for node in (0, 1):
        cluster.kill(node)
    cluster.wait_status(lambda s: job_row(s, "job")["verdict"] == "UNPROTECTED", "the losses to be seen", node=2)
    # A last word of a dead node may still have been on its way: it counts as alive again for a moment.
    until(lambda: cluster.command("check", node=2).returncode == 2, "check to say critical")
    cluster.start([0, 1])  # the rebuild begins by itself
    found = cluster.command("recover", node=3)
    assert found.returncode == 0, found.stderr
    cluster.wait_status(lambda s: s["verdict"] == "HEALTHY", "healthy again")
    assert cluster.command("check").returncode == 0
    again = Trainer(cluster, "job")
    assert again.restore() == 1
    again.commit(2)
    again.snapshotter.close()


def test_a_rank_that_asks_before_anybody_recovers_gets_its_bytes(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(nodes=2, parity=1)
    cluster.start()
    trainer = Trainer(cluster, "job")
    trainer.commit(5)
    trainer.vanish()
    cluster.kill(0)
    cluster.start([0])
    again = Trainer(cluster, "job")
    assert again.restore() == 5
    again.commit(6)
    again.snapshotter.close()


def test_one_more_than_parity_is_said_clearly(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(nodes=3, parity=1)
    cluster.start()
    trainer = Trainer(cluster, "job")
    trainer.commit(0)
    trainer.vanish()
    for node in (0, 1):
        cluster.kill(node)
    cluster.start([0, 1])
    cluster.wait_status(lambda s: s["verdict"] == "LOST", "the verdict LOST")
    with pytest.raises(NotRecoverableError, match="2 are lost \\(n0, n1\\), parity 1"):
        Trainer(cluster, "job").restore()
    found = cluster.command("recover")
    assert found.returncode == 3, (found.stdout, found.stderr)
    assert "n0" in found.stderr
    assert "n1" in found.stderr
    assert cluster.command("check").returncode == 2
    assert cluster.status()["verdict"] == "LOST"


def flip_byte(pid: int, name: str) -> None:
    """Change one byte of a worker's held memory, as a bad memory cell would. Every memfd of that name is hit."""
    hit: set[int] = set()  # a mapping keeps a descriptor of its own
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if str(entry.readlink()).startswith(f"/memfd:{name}") and entry.stat().st_ino not in hit:
                hit.add(entry.stat().st_ino)
                with entry.open("r+b", buffering=0) as memory:
                    memory.seek(70_000)
                    found = memory.read(1)
                    memory.seek(70_000)
                    memory.write(bytes([found[0] ^ 0x40]))
    assert hit


def test_a_chunk_that_rots_at_rest_is_repaired(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(nodes=2, parity=1)
    cluster.start()
    trainer = Trainer(cluster, "job")
    trainer.commit(0)
    trainer.snapshotter.close()
    flip_byte(cluster.worker(0), "holdfast-data")
    again = Trainer(cluster, "job")
    assert again.restore() == 0  # checked to be the bytes of step 0
    assert job_row(cluster.status(), "job")["digest_failures"] >= 1
    cluster.wait_log(0, "fail their digest at rest")
    again.snapshotter.close()


def test_rot_where_there_is_no_parity_is_refused(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(nodes=1, parity=0)
    cluster.start()
    trainer = Trainer(cluster, "job")
    trainer.commit(0)
    trainer.snapshotter.close()
    flip_byte(cluster.worker(0), "holdfast-data")
    with pytest.raises(NotRecoverableError, match=r"digest.*may be overwritten in part"):
        Trainer(cluster, "job").restore()


def test_several_ranks_on_a_node(make_cluster: MakeCluster, make_rank: MakeRank, tmp_path: Path) -> None:
    """2 nodes x 2 ranks over gloo: all ranks killed, then one node lost: equal bytes both times."""
    cluster = make_cluster(nodes=2, parity=1)
    cluster.start()

    def ranks(life: int) -> list[RankProcess]:
        return [
            make_rank(socket=cluster.socket(rank // 2), job="wide", rank=rank, world=4, meet=tmp_path / f"meet{life}",
                      size_bytes=(1 << 19) + 80_000 * rank)
            for rank in range(4)
        ]  # fmt: skip

    def all_do(group: list[RankProcess], do: str, **what: object) -> list[object]:
        for rank in group:
            rank.tell(do, **what)
        answers = [rank.answer() for rank in group]
        assert not [answer for answer in answers if "error" in answer], answers
        return [answer["result"] for answer in answers]

    group = ranks(0)
    assert all_do(group, "restore") == [None] * 4
    for step in range(3):
        all_do(group, "step", step=step)
    all_do(group, "wait")
    for rank in group:
        rank.kill()
    group = ranks(1)
    cluster.kill(1)  # while they start
    cluster.start([1])
    assert all_do(group, "restore") == [2] * 4
    assert all_do(group, "equal", step=2) == [True] * 4
    all_do(group, "step", step=3)
    all_do(group, "wait")
    all_do(group, "close")
    assert job_row(cluster.status(), "wide")["committed_step"] == 3
