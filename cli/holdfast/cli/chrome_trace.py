"""What nodes remember, as a Chrome trace: one JSON object that Perfetto and chrome://tracing open.

Pure. A node is a process there, its ranks and stages are its threads. All times are on the clock of the node that was
asked, from the first event on, in microseconds. Spans of one thread never overlap: where a stage of two snapshots goes
on at the same time, the second one gets a thread of its own under the same name.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.cli.clocks import Offset
from holdfast.protocol.trace import STAGES, NodeTrace, Span

SCHEMA = "holdfast.trace/1"
_ROWS = list(STAGES)  # the order of a node's own threads; before them come those of its ranks
_PID_FIRST = 1  # of node 0; viewers take process 0 for the kernel's idle threads
_LANES_MAX = 100  # threads under one name; more snapshots at once than there can be slots


@dataclass(frozen=True, slots=True)
class Remembered:
    """One node: what it remembers and how its clock lies to that of the node that was asked."""

    node: int
    name: str
    trace: NodeTrace
    offset: Offset


def chrome_trace(nodes: Sequence[Remembered], *, cluster: str, missing: Mapping[str, str]) -> dict[str, Any]:
    """The whole object.

    Args:
        nodes: those that answered.
        cluster: its name.
        missing: those that did not, and why.
    """
    zero_ns = min(
        (span.start_ns - one.offset.ahead_ns for one in nodes for span in one.trace.spans),
        default=0,
    )
    traced: list[dict[str, Any]] = []
    for one in nodes:
        traced += _of_node(one, zero_ns)
    return {
        "schema": SCHEMA,
        "displayTimeUnit": "ms",
        "otherData": {
            "cluster": cluster,
            "clock_error_us": {one.name: one.offset.error_ns / 1000 for one in nodes},
            "missing": dict(missing),
            "forgotten_spans": {one.name: one.trace.forgotten_count for one in nodes if one.trace.forgotten_count},
        },
        "traceEvents": traced,
    }


def _of_node(one: Remembered, zero_ns: int) -> list[dict[str, Any]]:
    named = [
        _meta("process_name", one.node, 0, name=f"node {one.name}"),
        _meta("process_sort_index", one.node, 0, sort_index=one.node),
        _meta("process_labels", one.node, 0, labels=f"clock within {one.offset.error_ns / 1e6:.3f} ms"),
    ]
    spans: list[dict[str, Any]] = []
    ends: dict[int, int] = {}  # thread -> when its last span ended
    for span in sorted(one.trace.spans, key=lambda span: (span.start_ns, span.end_ns)):
        first = _thread(span)
        thread = next(lane for lane in range(first, first + _LANES_MAX) if ends.get(lane, 0) <= span.start_ns)
        if thread not in ends:
            named.append(_meta("thread_name", one.node, thread, name=_row(span)))
            named.append(_meta("thread_sort_index", one.node, thread, sort_index=thread))
        ends[thread] = span.end_ns
        spans.append(_complete(span, one.node, thread, zero_ns + one.offset.ahead_ns))
    return named + spans


def _row(span: Span) -> str:
    return f"rank {span.rank}" if span.rank >= 0 else span.stage


def _thread(span: Span) -> int:
    """The first thread of a row; a row has room for several."""
    stage = _ROWS.index(span.stage) if span.stage in STAGES else len(_ROWS)
    return _LANES_MAX * (1 + (len(_ROWS) + 1 + span.rank if span.rank >= 0 else stage))


def _complete(span: Span, node: int, thread: int, zero_ns: int) -> dict[str, Any]:
    step = "" if span.snapshot is None else f" {span.snapshot.step}"
    about: dict[str, Any] = {"job": span.job, "count": span.count}
    if span.snapshot is not None:
        about |= {"step": span.snapshot.step, "attempt": span.snapshot.attempt}
    if span.rank >= 0:
        about["rank"] = span.rank
    if span.note:
        about["note"] = span.note
    return {
        "name": f"{span.stage}{step}",
        "cat": span.stage,
        "ph": "X",
        "ts": (span.start_ns - zero_ns) / 1000,
        "dur": (span.end_ns - span.start_ns) / 1000,
        "pid": _PID_FIRST + node,
        "tid": thread,
        "args": about,
    }


def _meta(kind: str, node: int, thread: int, **about: object) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": _PID_FIRST + node, "tid": thread, "args": about}


def summary(nodes: Sequence[Remembered], *, missing: Mapping[str, str], asked: Iterable[str]) -> str:
    """What there is, for people, in a line or two."""
    spans = [span for one in nodes for span in one.trace.spans]
    snapshots = {(span.job, span.snapshot) for span in spans if span.snapshot is not None}
    error_ms = max((one.offset.error_ns for one in nodes), default=0) / 1e6
    count = len(list(asked))
    told = (
        f"{len(nodes)} of {count} nodes, {len(snapshots)} snapshots, {len(spans)} spans; clocks aligned to within "
        f"{error_ms:.3f} ms; open it in ui.perfetto.dev or chrome://tracing"
    )
    return "\n".join([told, *(f"missing: {name}: {why}" for name, why in sorted(missing.items()))])
