"""The demonstration's three faults: what is killed, what is waited for, and what is measured meanwhile.

Covers one cluster with one training. Every wait has a deadline and says what it waited for.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from holdfast.cli import processes, recover
from holdfast.cli.cluster import Cluster, tail
from holdfast.cli.demo_report import Fault
from holdfast.cli.demo_training import Training
from holdfast.cli.demo_view import View
from holdfast.cli.link import Daemon
from holdfast.cli.status import mib
from holdfast.protocol.exit_codes import ExitCode, OperatorError

STEPPING_S = 180.0  # until ranks that start have trained: their imports on few cores dominate
FAULT_S = 60.0  # until the next step of something whose parts take seconds
LOOK_S = 0.03
STATUS_S = 0.2  # between two questions to a daemon


class NotRecoverableHereError(OperatorError):
    """More was killed than parity covers, and the cluster says so. Exit code 3."""

    def __init__(self, text: str, *, killed: tuple[str, ...], at_step: int) -> None:
        super().__init__(ExitCode.NOT_RECOVERABLE, text)
        self.killed, self.at_step = killed, at_step


@dataclass(slots=True)
class Stage:
    """The cluster, the training on it, and whoever watches."""

    cluster: Cluster
    training: Training
    view: View
    status: dict[str, Any] | None = None
    asked: str = ""  # the node whose daemon is asked; one that the fault spares
    next_status_s: float = field(default=0.0)

    def look(self) -> None:
        """Take in what is new, and show it."""
        self.training.log.read()
        now_s = time.monotonic()
        if now_s >= self.next_status_s:
            with contextlib.suppress(OperatorError):  # no answer while daemons die; the wait's deadline bounds this
                self.status = self.cluster.status(self.asked or None)
            self.next_status_s = time.monotonic() + STATUS_S
        self.view.show(self.status, self.training)

    def until(self, is_so: Callable[[], bool], what: str, *, seconds: float = FAULT_S) -> float:
        """Look until something is so; returns when, on the monotonic clock.

        Raises:
            OperatorError: it takes longer than `seconds`, or the training ended before.
        """
        deadline_s = time.monotonic() + seconds
        while True:
            self.look()
            if is_so():
                return time.monotonic()
            if self.training.has_ended():
                self.training.log.read()
                if is_so():
                    return time.monotonic()
                raise OperatorError(ExitCode.USAGE, f"the training ended before {what}; give more --steps")
            if time.monotonic() > deadline_s:
                raise OperatorError(
                    ExitCode.BUG,
                    f"waited {seconds} s for {what}, found {self._summary()}; {tail(self.training.output)}\n"
                    f"and {self.cluster.log_hint(self.asked or next(iter(self.cluster.nodes)))}",
                )
            time.sleep(LOOK_S)

    def _summary(self) -> str:
        log, status = self.training.log, self.status
        seen = f"verdict {status['verdict']}, {status['reason'] or 'no reason'}" if status else "no status"
        return f"restart {log.restart}, steps {log.step_of}, restored {log.restored}, {seen}"

    def spare(self, names: Iterable[str]) -> None:
        """Ask a daemon that is not one of these from now on."""
        away = set(names)
        self.asked = next(name for name in self.cluster.nodes if name not in away)

    @property
    def job(self) -> dict[str, Any] | None:
        """The training's row in the status."""
        jobs = self.status["jobs"] if self.status else []
        return jobs[0] if jobs else None

    @property
    def committed_step(self) -> int:
        """The newest committed step that the status knows; -1 if nothing is."""
        return -1 if self.job is None or self.job["committed_step"] is None else int(self.job["committed_step"])

    def node(self, name: str) -> dict[str, Any]:
        """A node's row in the status."""
        assert self.status is not None
        return next(row for row in self.status["nodes"] if row["name"] == name)


def reach(stage: Stage, step: int) -> None:
    """Wait until every rank has finished a step and something is committed."""
    stage.until(
        lambda: stage.training.log.step_of_all >= step and stage.committed_step >= 0,
        f"step {step} and a committed snapshot",
        seconds=STEPPING_S,
    )


def kill_ranks(stage: Stage) -> Fault:
    """All ranks die; the launcher starts them anew, each finds its state in its own node's memory."""
    log = stage.training.log
    at_step, restart = log.newest_step, log.restart
    before = set(stage.training.rank_pids)
    stage.view.say(f"fault 1: all {log.world_size} ranks are killed (SIGKILL) after step {at_step}")
    killed_s = time.monotonic()
    stage.training.kill_ranks(list(log.pids))
    detected_s = stage.until(lambda: _started_anew(stage, before), "the launcher to start the ranks anew")
    restored_s, restored_step, resumed_s = _follow_restart(stage, restart)
    return Fault(
        kind="ranks",
        at_step=at_step,
        restored_step=restored_step,
        killed=tuple(stage.cluster.nodes),
        detected_s=detected_s - killed_s,
        restored_s=restored_s - killed_s,
        resumed_s=resumed_s - killed_s,
    )


def kill_worker(stage: Stage, name: str) -> Fault:
    """One daemon's worker dies; its keeper, which holds the memory, starts another."""
    log = stage.training.log
    stage.spare([name])
    stage.until(lambda: _is_whole(stage, name), f"node {name} to hold the committed snapshot")
    at_step, restart, committed = log.newest_step, log.restart, stage.committed_step
    session = stage.node(name)["worker_session"]
    before = stage.cluster.worker_pids(name)
    stage.view.say(f"fault 2: the worker of node {name} is killed (SIGKILL) after step {at_step}")
    killed_s = time.monotonic()
    processes.kill(before)
    detected_s = stage.until(
        lambda: bool(set(stage.cluster.worker_pids(name)) - set(before)), f"the keeper of {name} to start a worker"
    )
    restored_s = stage.until(
        lambda: stage.node(name)["worker_session"] > session and _is_whole(stage, name),
        f"the new worker of node {name} to answer with its memory",
    )
    held_step = int(stage.node(name)["jobs"][_job_name(stage)]["committed_step"])
    assert held_step >= committed, f"committed step {committed} was lost: the worker took up {held_step}"
    stage.view.say(f"  its memory is whole, step {held_step} is held; training goes on")
    newest = max(at_step, held_step)
    resumed_s = stage.until(lambda: stage.committed_step > newest, f"a snapshot newer than step {newest} to commit")
    return Fault(
        kind="worker",
        at_step=at_step,
        restored_step=held_step,
        killed=(name,),
        detected_s=detected_s - killed_s,
        restored_s=restored_s - killed_s,
        resumed_s=resumed_s - killed_s,
        training_restarted=log.restart > restart,
    )


def kill_nodes(stage: Stage, names: tuple[str, ...]) -> Fault:
    """Whole nodes die with their memory; replacements take their places and are rebuilt from the survivors.

    Raises:
        NotRecoverableHereError: parity does not cover that many.
    """
    log, parity = stage.training.log, stage.cluster.config.parity
    stage.spare(names)
    at_step, restart = log.newest_step, log.restart
    listed = ", ".join(names)
    before = {name: int(stage.node(name)["incarnation"]) for name in names}
    stage.view.say(f"fault 3: lost after step {at_step}: {listed}, with keeper, worker, rank and all memory (SIGKILL)")
    killed_s = time.monotonic()
    stage.cluster.kill(names)
    positions = list(stage.cluster.nodes)
    stage.training.kill_ranks([positions.index(name) for name in names])
    stage.cluster.start(names)
    stage.view.say(f"  replacements for {listed} are started, with empty memory")
    detected_s = stage.until(
        lambda: set(names) <= _lost(stage) | _replaced(stage, before), f"the cluster to notice the loss of {listed}"
    )
    if len(names) > parity:
        stage.until(lambda: stage.job is not None and stage.job["verdict"] == "LOST", "the cluster to say what is lost")
        raise _not_recoverable(stage, names, at_step)
    rebuilt_bytes, rebuild_s, rebuilt_at_s = _rebuild(stage, before)
    restored_s, restored_step, resumed_s = _follow_restart(stage, restart)
    return Fault(
        kind="nodes",
        at_step=at_step,
        restored_step=restored_step,
        killed=names,
        detected_s=detected_s - killed_s,
        rebuilt_s=rebuilt_at_s - killed_s,
        restored_s=max(restored_s, rebuilt_at_s) - killed_s,
        resumed_s=max(resumed_s, rebuilt_at_s) - killed_s,
        rebuilt_bytes=rebuilt_bytes,
        rebuild_s=rebuild_s,
    )


def _rebuild(stage: Stage, before: Mapping[str, int]) -> tuple[int, float, float]:
    """What `holdfast recover` does, for the nodes whose incarnations were `before`.

    A replacement begins by itself, and may be whole before anybody asks: what the nodes themselves counted is told.

    Returns:
        The bytes that came back, the seconds of the longest rebuild, and when all was whole.
    """
    stage.until(
        lambda: all(_has_joined(stage, name, before[name]) for name in before),
        f"the replacements of {', '.join(before)} to learn what they lost",
    )
    stage.view.say("  recover: what they lost is rebuilt from parity")
    with Daemon(stage.cluster.nodes[stage.asked].socket) as daemon:
        daemon.recover()
        recover.watch(daemon, set(before), lambda _: stage.look())
        ended_s = time.monotonic()
        rows = [row for row in daemon.status()["nodes"] if row["name"] in before]
    rebuilt = [held for row in rows for held in row["jobs"].values()]
    rebuilt_bytes = sum(int(held["received_bytes"]) for held in rebuilt)
    rebuild_s = max(float(held["rebuild_s"]) for held in rebuilt)
    stage.view.say(f"  {mib(rebuilt_bytes)} rebuilt in {rebuild_s:.2f} s")
    return rebuilt_bytes, rebuild_s, ended_s


def _follow_restart(stage: Stage, restart: int) -> tuple[float, int, float]:
    """Returns when all ranks had restored, which step, and when all had trained a new one."""
    log = stage.training.log
    restored_s = stage.until(
        lambda: log.restart > restart and log.restored_by_all is not None,
        "all ranks to restore their state",
        seconds=STEPPING_S,
    )
    restored_step = log.restored_by_all
    assert restored_step is not None
    stage.view.say(f"  all ranks have restored step {restored_step}")
    resumed_s = stage.until(lambda: log.step_of_all > restored_step, "a new step of all ranks")
    return restored_s, restored_step, resumed_s


def _not_recoverable(stage: Stage, names: tuple[str, ...], at_step: int) -> NotRecoverableHereError:
    parity, job = stage.cluster.config.parity, stage.job
    assert job is not None
    text = (
        f"not recoverable: {', '.join(names)} were killed after step {at_step}, and with them the memory of "
        f"{len(names)} of {len(stage.cluster.nodes)} nodes. Lost: the snapshot of step {job['committed_step']}, the "
        f"newest that was committed (the cluster says {job['verdict']}: {job['reason']}). Needed: the memory of at "
        f"least {len(names) - parity} of these nodes, or --parity {len(names)}, or a durable copy"
    )
    return NotRecoverableHereError(text, killed=names, at_step=at_step)


def _started_anew(stage: Stage, before: set[int]) -> bool:
    return bool(set(stage.training.rank_pids) - before)


def _lost(stage: Stage) -> set[str]:
    """Nodes that are away, or lack what is committed."""
    if stage.status is None or stage.job is None:
        return set()
    away = {row["name"] for row in stage.status["nodes"] if row["state"] != "up"}
    return away | set(stage.job["lost_nodes"])


def _replaced(stage: Stage, before: Mapping[str, int]) -> set[str]:
    """Nodes whose place another has taken, which may have been rebuilt between two looks."""
    return {name for name in before if stage.node(name)["incarnation"] > before[name]}


def _lost_bytes(stage: Stage, name: str) -> int:
    return sum(int(held["lost_bytes"]) for held in stage.node(name)["jobs"].values())


def _is_whole(stage: Stage, name: str) -> bool:
    """Whether a node holds all that it should of the newest committed snapshot.

    A replacement that has heard of the snapshot but not of its layout yet counts nothing as lost, so its own word is
    not enough.
    """
    row, job = stage.node(name), stage.job
    if job is None or job["snapshot_bytes"] is None or name in job["lost_nodes"]:
        return False
    return row["state"] == "up" and bool(row["jobs"]) and all(held["whole"] for held in row["jobs"].values())


def _has_joined(stage: Stage, name: str, incarnation: int) -> bool:
    """Whether a replacement has joined and knows what it lost (or has it back, if a rank asked for it early)."""
    joined = int(stage.node(name)["incarnation"]) > incarnation
    return joined and (_lost_bytes(stage, name) > 0 or _is_whole(stage, name))


def _job_name(stage: Stage) -> str:
    assert stage.job is not None
    return str(stage.job["name"])
