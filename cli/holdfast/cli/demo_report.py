"""What the demonstration found: the records of its faults, the comparison with the undisturbed run, the verdict.

Pure: plain values in, plain values and text out. Seconds are counted from the kill.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from statistics import median
from typing import Literal

from holdfast.cli.demo_log import RunLog
from holdfast.cli.output import pairs, table
from holdfast.cli.status import mib

SCHEMA = "holdfast.demo/1"
DIFFERENCES_SHOWN = 5

Kind = Literal["ranks", "worker", "nodes"]
TITLES: Mapping[Kind, str] = {
    "ranks": "all ranks killed",
    "worker": "a worker killed",
    "nodes": "whole nodes killed",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault that was survived.

    Attributes:
        kind: what was killed.
        at_step: the newest step that any rank had finished at the kill.
        restored_step: ranks, nodes: the step from which all ranks went on; worker: the committed step that the new
            worker took up from held memory.
        killed: names of the nodes that lost something.
        detected_s: until somebody acted on it: the launcher, the keeper, the other nodes.
        rebuilt_s: until the lost memory was rebuilt from parity; None where none was lost.
        restored_s: until every rank had its state back; for a worker, until it answered with its memory.
        resumed_s: until every rank had finished a new step; for a worker, until a newer step was committed.
        rebuilt_bytes: of memory that was lost and rebuilt.
        rebuild_s: what the rebuild alone took.
        training_restarted: whether the ranks were started anew.
    """

    kind: Kind
    at_step: int
    restored_step: int
    killed: tuple[str, ...]
    detected_s: float
    restored_s: float
    resumed_s: float
    rebuilt_s: float | None = None
    rebuilt_bytes: int = 0
    rebuild_s: float = 0.0
    training_restarted: bool = True

    def __post_init__(self) -> None:
        assert 0 <= self.detected_s <= self.restored_s <= self.resumed_s, self
        assert self.restored_step <= self.at_step or self.kind == "worker", self

    def fields(self) -> dict[str, object]:
        """As JSON shows it."""
        return {
            "kind": self.kind,
            "at_step": self.at_step,
            "restored_step": self.restored_step,
            "seconds": self.resumed_s,
            "nodes": list(self.killed),
            "detected_s": self.detected_s,
            "rebuilt_s": self.rebuilt_s,
            "restored_s": self.restored_s,
            "resumed_s": self.resumed_s,
            "rebuilt_bytes": self.rebuilt_bytes,
            "rebuild_s": self.rebuild_s,
            "training_restarted": self.training_restarted,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The disturbed run beside the undisturbed one.

    Attributes:
        bit_exact: every rank's hash at every restored step and at the end is that of the undisturbed run.
        losses_equal: every loss that was ever reported, also of steps trained twice, is equal to the last bit.
        final_sha256: SHA-256 over the ranks' final hashes (32 bytes each) in the order of ranks.
        reference_sha256: the same of the undisturbed run.
        differences: what differs, in words; empty if nothing does.
    """

    bit_exact: bool
    losses_equal: bool
    final_sha256: str
    reference_sha256: str
    differences: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What was measured beside the faults. Bytes are of the whole cluster, seconds of wall time."""

    snapshot_bytes: int
    arena_bytes: int
    phases_s: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What was asked for."""

    nodes: int
    parity: int
    kill: int
    steps: int


def compare(run: RunLog, reference: RunLog, *, steps: int) -> Comparison:
    """Compare two runs of `steps` steps and equally many ranks."""
    hash_differences = []
    restored = {step for step, _ in run.hashes}
    for step in sorted(restored):
        for rank in range(run.world_size):
            found, expected = run.hashes.get((step, rank), set()), reference.hashes.get((step, rank), set())
            if len(expected) != 1 or found != expected:
                hash_differences.append(f"step {step}, rank {rank}: SHA-256 {_shown(found)} is not {_shown(expected)}")
    if steps - 1 not in restored:
        hash_differences.append(f"no hash of the last step, {steps - 1}, was reported")
    loss_differences = []
    for step in range(steps):
        found, expected = run.losses.get(step, set()), reference.losses.get(step, set())
        if len(expected) != 1 or found != expected:
            loss_differences.append(f"step {step}: loss {_shown(found)} is not {_shown(expected)}")
    return Comparison(
        bit_exact=not hash_differences,
        losses_equal=not loss_differences,
        final_sha256=_final(run, steps - 1),
        reference_sha256=_final(reference, steps - 1),
        differences=tuple((hash_differences + loss_differences)[:DIFFERENCES_SHOWN]),
    )


def _final(log: RunLog, step: int) -> str:
    """One hash over all ranks'; empty if one is missing or said two."""
    parts = [sorted(log.hashes.get((step, rank), ())) for rank in range(log.world_size)]
    if any(len(part) != 1 for part in parts):
        return ""
    return sha256(b"".join(bytes.fromhex(part[0]) for part in parts)).hexdigest()


def _shown(values: set[str]) -> str:
    return " or ".join(sorted(values)) or "nothing"


def survived(faults: Sequence[Fault], comparison: Comparison) -> bool:
    """Whether the demonstration succeeded."""
    return len(faults) == len(TITLES) and comparison.bit_exact and comparison.losses_equal


def verdict(shape: Shape, faults: Sequence[Fault], comparison: Comparison) -> str:
    """The outcome in one line."""
    if survived(faults, comparison):
        lost = f"{shape.kill} whole node{'s' if shape.kill > 1 else ''}"
        return (
            f"SURVIVED: after the loss of all ranks, of a worker and of {lost} of {shape.nodes}, all {shape.steps} "
            "steps and the final state are equal, bit for bit, to those of an undisturbed run"
        )
    parts = [f"{len(faults)} of {len(TITLES)} faults survived"]
    parts += [] if comparison.bit_exact else ["the state is NOT bit-exact"]
    parts += [] if comparison.losses_equal else ["the losses are NOT equal"]
    return "FAILED: " + ", ".join(parts)


def report(
    shape: Shape, run: RunLog, faults: Sequence[Fault], *, comparison: Comparison, figures: Figures
) -> dict[str, object]:
    """The whole report, without the schema's name."""
    nodes = next((fault for fault in faults if fault.kind == "nodes"), None)
    return {
        "nodes": shape.nodes,
        "parity": shape.parity,
        "kill": shape.kill,
        "steps": shape.steps,
        "killed_nodes": list(nodes.killed) if nodes else [],
        "killed_at_step": nodes.at_step if nodes else None,
        "restored_step": nodes.restored_step if nodes else None,
        "faults": [fault.fields() for fault in faults],
        "bit_exact": comparison.bit_exact,
        "losses_equal": comparison.losses_equal,
        "final_sha256": comparison.final_sha256,
        "reference_sha256": comparison.reference_sha256,
        "differences": list(comparison.differences),
        "stall_s_median": median(run.stalls_s) if run.stalls_s else None,
        "snapshot_bytes": figures.snapshot_bytes,
        "arena_bytes": figures.arena_bytes,
        "rebuilt_bytes": nodes.rebuilt_bytes if nodes else 0,
        "rebuild_s": nodes.rebuild_s if nodes else None,
        "phases_s": dict(figures.phases_s),
        "survived": survived(faults, comparison),
        "verdict": verdict(shape, faults, comparison),
    }


def render(shape: Shape, run: RunLog, faults: Sequence[Fault], *, comparison: Comparison, figures: Figures) -> str:
    """The report for people; the verdict comes last, where the eye is."""
    header = ["fault", "nodes", "at step", "detected", "rebuilt", "restored", "new step", "restored step"]
    rows = [
        [
            TITLES[fault.kind],
            ", ".join(fault.killed) if fault.kind != "ranks" else "all",
            str(fault.at_step),
            f"{fault.detected_s:.1f} s",
            "-" if fault.rebuilt_s is None else f"{fault.rebuilt_s:.1f} s",
            f"{fault.restored_s:.1f} s",
            f"{fault.resumed_s:.1f} s",
            str(fault.restored_step) + ("" if fault.training_restarted else " (held)"),
        ]
        for fault in faults
    ]
    stall = f"{median(run.stalls_s) * 1000:.1f} ms" if run.stalls_s else "-"
    rebuilds = [f for f in faults if f.rebuilt_s is not None]
    rebuilt = ", ".join(f"{mib(f.rebuilt_bytes)} in {f.rebuild_s:.2f} s" for f in rebuilds) or "-"
    about = [
        ("training", f"{shape.steps} steps on {shape.nodes} ranks, one snapshot per step"),
        ("seconds", ", ".join(f"{name} {seconds:.1f}" for name, seconds in figures.phases_s.items())),
        ("stall", f"{stall} per step (median over all ranks and steps)"),
        ("snapshot", f"{mib(figures.snapshot_bytes)} over all nodes"),
        ("arena", f"{mib(figures.arena_bytes)} over all nodes: two snapshots and their parity"),
        ("rebuild", rebuilt),
        ("final state", comparison.final_sha256),
        ("undisturbed", comparison.reference_sha256),
    ]
    parts = [table(header, rows, indent=""), pairs(about, indent="")]
    if comparison.differences:
        parts.append("\n".join(comparison.differences))
    parts.append(verdict(shape, faults, comparison))
    return "\n\n".join(parts)
