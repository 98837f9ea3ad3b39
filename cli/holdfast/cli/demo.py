"""`holdfast demo`: real training on a local cluster, real kills, and the proof that nothing was changed by them.

Covers the verb: the order of things and what is said at the end. The faults are of `demo_faults`, the launcher of
`demo_training`, what is compared and shown of `demo_report`.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from holdfast.cli import cluster as clusters
from holdfast.cli import demo_faults, demo_report, processes
from holdfast.cli.arguments import Subparsers, add_json_flag, whole
from holdfast.cli.cluster import Cluster
from holdfast.cli.demo_faults import NotRecoverableHereError, Stage
from holdfast.cli.demo_report import Comparison, Fault, Figures, Shape
from holdfast.cli.demo_training import Launch, Training, refuse_missing_torch
from holdfast.cli.demo_view import View, choose_view
from holdfast.cli.interruption import StopAskedError, ending_signals_raise, ending_signals_wait
from holdfast.cli.output import emit, emit_json
from holdfast.protocol.exit_codes import ExitCode, OperatorError

NODES_MAX = 32  # each is a daemon and a rank of half a gigabyte on this machine
STEPS_MIN, STEPS_MAX = 8, 1000  # fewer leave no room between the faults
NODES, PARITY, KILL, STEPS = 6, 2, 2, 24
MEMORY_SHARE = 0.25  # of the machine's free memory that all daemons together may hold
CHUNK_BYTES = 64 << 10  # small, so that a few MiB make many stripes
RUN_S = 600.0  # for what is left to train after the last fault, and for the undisturbed run


def add_parser(subparsers: Subparsers) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "demo", help="train on a local cluster, kill nodes, recover, and check that the result is bit-exact"
    )
    parser.add_argument("--nodes", type=whole(2, NODES_MAX), default=NODES, metavar="N", help=f"default: {NODES}")
    parser.add_argument(
        "--parity", type=whole(0, NODES_MAX - 1), default=PARITY, metavar="M", help=f"node losses covered; {PARITY}"
    )
    parser.add_argument(
        "--kill", type=whole(1, NODES_MAX - 1), default=KILL, metavar="K", help=f"nodes killed at once; {KILL}"
    )
    parser.add_argument(
        "--steps", type=whole(STEPS_MIN, STEPS_MAX), default=STEPS, metavar="S", help=f"steps to train; {STEPS}"
    )
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Run the demonstration."""
    shape = Shape(nodes=args.nodes, parity=args.parity, kill=args.kill, steps=args.steps)
    refuse_bad_shape(shape)
    refuse_missing_torch()
    with ending_signals_raise(), _folder() as folder:
        demonstration = Demonstration(shape, folder)
        try:
            with choose_view() as view:
                comparison = demonstration.perform(view)
        except NotRecoverableHereError as error:
            if args.json:
                emit_json(demo_report.SCHEMA, demonstration.failure(error))
            raise
    return _say(demonstration, comparison, as_json=args.json)


def refuse_bad_shape(shape: Shape) -> None:
    """Raises OperatorError (exit code 2) for numbers that make no cluster."""
    problems = []
    if shape.parity >= shape.nodes:
        problems.append(f"--parity: expected less than the {shape.nodes} nodes, found {shape.parity}")
    if shape.kill >= shape.nodes:
        problems.append(
            f"--kill: expected less than the {shape.nodes} nodes, since somebody must be left to rebuild from, "
            f"found {shape.kill}"
        )
    if problems:
        raise OperatorError(ExitCode.USAGE, "; ".join(problems) + "; give other numbers, or more --nodes")


def fault_steps(steps: int) -> tuple[int, int, int]:
    """After which steps the faults come: at a quarter, at half, at three quarters of the training."""
    return steps // 4, steps // 2, steps * 3 // 4


def spread(names: list[str], count: int) -> tuple[str, ...]:
    """`count` of the nodes, evenly spread over the positions of their group, the first (the collector) among them."""
    return tuple(names[index * len(names) // count] for index in range(count))


@dataclass(slots=True)
class Demonstration:
    """One run of it, and what it has found so far."""

    shape: Shape
    folder: Path
    faults: list[Fault] = field(default_factory=list)
    phases_s: dict[str, float] = field(default_factory=dict)
    snapshot_bytes: int = 0
    arena_bytes: int = 0
    training: Training | None = None

    def perform(self, view: View) -> Comparison:
        """Train with faults, train without, compare."""
        shape = self.shape
        cluster = clusters.create(
            self.folder,
            node_count=shape.nodes,
            parity=shape.parity,
            group_size=shape.nodes,
            memory_share=MEMORY_SHARE,
            chunk_bytes=CHUNK_BYTES,
        )
        with cluster:
            self._train(cluster, view)
            with self._phase("stop"):
                cluster.stop()
        assert self.training is not None
        view.say("the same training again, undisturbed and without snapshots, to compare with")
        reference = self._launch("reference", hash_steps=tuple(self.training.log.restored_steps))
        with self._phase("reference"):
            self._finish(reference, view)
        return demo_report.compare(self.training.log, reference.log, steps=shape.steps)

    def _train(self, cluster: Cluster, view: View) -> None:
        names = list(cluster.nodes)
        view.say(f"starting {len(names)} node daemons, parity {self.shape.parity}, in {self.folder}")
        with self._phase("daemons"):
            cluster.start(names)
            cluster.wait_up()
        view.say(f"starting {len(names)} training ranks under torchrun: a GPT, FSDP2, one snapshot per step")
        self.training = self._launch("training", sockets=cluster.sockets)
        stage = Stage(cluster, self.training, view)
        first, second, third = fault_steps(self.shape.steps)
        with self._phase("first steps"):
            demo_faults.reach(stage, 0)
        demo_faults.reach(stage, first)
        self._measure(stage)
        with self._phase("fault 1"):
            self.faults.append(demo_faults.kill_ranks(stage))
        demo_faults.reach(stage, second)
        with self._phase("fault 2"):
            self.faults.append(demo_faults.kill_worker(stage, names[-1]))
        demo_faults.reach(stage, third)
        with self._phase("fault 3"):
            self.faults.append(demo_faults.kill_nodes(stage, spread(names, self.shape.kill)))
        with self._phase("last steps"):
            view.say("training goes on to its end")
            stage.until(self.training.has_ended, "the training to end", seconds=RUN_S)

    def _measure(self, stage: Stage) -> None:
        assert stage.status is not None
        assert stage.job is not None
        self.snapshot_bytes = int(stage.job["snapshot_bytes"] or 0)
        self.arena_bytes = sum(int(node["arena_bytes"]) for node in stage.status["nodes"])

    def _launch(self, name: str, *, sockets: str | None = None, hash_steps: tuple[int, ...] = ()) -> Training:
        return Training(
            Launch(
                name=name,
                folder=self.folder,
                ranks=self.shape.nodes,
                steps=self.shape.steps,
                sockets=sockets,
                hash_steps=hash_steps,
            )
        )

    def _finish(self, training: Training, view: View) -> None:
        deadline_s = time.monotonic() + RUN_S
        while not training.has_ended():
            training.log.read()
            view.show(None, training)
            if time.monotonic() > deadline_s:
                raise OperatorError(
                    ExitCode.BUG,
                    f"the undisturbed run did not end within {RUN_S} s; {clusters.tail(training.output)}",
                )
            time.sleep(demo_faults.LOOK_S)
        training.log.read()

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        started_s = time.monotonic()
        try:
            yield
        finally:
            self.phases_s[name] = time.monotonic() - started_s

    @property
    def figures(self) -> Figures:
        """What was measured beside the faults."""
        return Figures(snapshot_bytes=self.snapshot_bytes, arena_bytes=self.arena_bytes, phases_s=self.phases_s)

    def failure(self, error: NotRecoverableHereError) -> dict[str, object]:
        """The report of a demonstration that ended with a loss."""
        assert self.training is not None
        nothing = Comparison(bit_exact=False, losses_equal=False, final_sha256="", reference_sha256="", differences=())
        fields = demo_report.report(
            self.shape, self.training.log, self.faults, comparison=nothing, figures=self.figures
        )
        lost = {"killed_nodes": list(error.killed), "killed_at_step": error.at_step}
        return {**fields, **lost, "verdict": f"LOST: {error}"}


def _say(demonstration: Demonstration, comparison: Comparison, *, as_json: bool) -> int:
    shape, faults, figures = demonstration.shape, demonstration.faults, demonstration.figures
    assert demonstration.training is not None
    log = demonstration.training.log
    if as_json:
        emit_json(demo_report.SCHEMA, demo_report.report(shape, log, faults, comparison=comparison, figures=figures))
    else:
        emit(demo_report.render(shape, log, faults, comparison=comparison, figures=figures))
    return int(ExitCode.DONE if demo_report.survived(faults, comparison) else ExitCode.BUG)


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder of its own. Whatever happens, no process that uses it is left; after a failure its logs are kept."""
    folder = Path(tempfile.mkdtemp(prefix="holdfast-demo-"))
    keep = False
    try:
        yield folder
    except NotRecoverableHereError:
        raise  # asked for, and explained: there is nothing to look up
    except StopAskedError as stop:
        sys.stderr.write(f"stopped by {stop}\n")
        raise
    except Exception:
        keep = True
        sys.stderr.write(f"the logs are kept in {folder}\n")
        raise
    finally:
        with ending_signals_wait():
            left = processes.kill_all_using(folder)
            if left:
                sys.stderr.write(f"processes {left} do not end; kill them by hand\n")
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)
