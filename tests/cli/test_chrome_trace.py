"""The trace that Perfetto opens, as it is written; and that threads hold no two spans at once.

``pytest tests/cli/test_chrome_trace.py --rewrite-transcripts`` writes the golden file anew; read the diff, too.
"""

import json
import math
from pathlib import Path

import pytest
from holdfast.cli.chrome_trace import Remembered, chrome_trace, summary
from holdfast.cli.clocks import Offset
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.trace import NodeTrace, Span
from trace_format import check_trace

GOLDEN = Path(__file__).parent / "golden" / "trace.json"
SEVEN, EIGHT = SnapshotId(1, 7), SnapshotId(1, 8)


def span(stage: str, snapshot: SnapshotId | None, start_us: int, end_us: int, **about: object) -> Span:
    return Span(stage, "gpt", snapshot, **{"rank": -1, **about}, start_ns=start_us * 1000, end_ns=end_us * 1000)  # type: ignore[arg-type]  # as written


def cluster() -> list[Remembered]:
    """Two nodes; the clock of b is 2 ms ahead."""
    a = (
        span("decide", None, 100, 150, rank=-1),
        span("begin", SEVEN, 1000, 1100, rank=0),
        span("stage", SEVEN, 1100, 1500, rank=0),
        span("protect", SEVEN, 1500, 2500),
        span("protect", EIGHT, 2000, 3000),
        span("commit", SEVEN, 2500, 2600),
    )
    b = (span("stage", SEVEN, 3100, 3600, rank=1, note="skipped: a test"), span("later", SEVEN, 3700, 3700))
    return [
        Remembered(0, "a", NodeTrace(9_000_000, 0, a), Offset(0, 0)),
        Remembered(1, "b", NodeTrace(11_000_000, 0, b, forgotten_count=3), Offset(2_000_000, 40_000)),
    ]


def test_the_trace_is_written_as_it_was(request: pytest.FixtureRequest) -> None:
    written = json.dumps(chrome_trace(cluster(), cluster="lab", missing={"c": "nothing is heard from it"}), indent=1)
    if request.config.getoption("--rewrite-transcripts"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(written + "\n", encoding="utf-8")
    assert written + "\n" == GOLDEN.read_text(encoding="utf-8")


def test_it_is_what_viewers_open() -> None:
    whole = chrome_trace(cluster(), cluster="lab", missing={})
    check_trace(whole)
    spans = [event for event in whole["traceEvents"] if event["ph"] == "X"]
    for wrong in ({"pid": 0}, {"ts": -1.0}, {"ts": math.nan}, {"tid": 7}, {"ts": spans[4]["ts"] - 1, "dur": 2}):
        broken = {**whole, "traceEvents": [*whole["traceEvents"], {**spans[4], **wrong}]}
        with pytest.raises((AssertionError, ValueError)):
            check_trace(broken)


def test_what_happened_at_the_same_time_stands_at_the_same_time() -> None:
    traced = chrome_trace(cluster(), cluster="lab", missing={})["traceEvents"]
    starts = {(event["pid"], event["name"]): event["ts"] for event in traced if event["ph"] == "X"}
    assert starts[1, "stage 7"] == starts[2, "stage 7"] == 1000.0
    assert min(starts.values()) == 0


def test_a_thread_holds_one_span_at_a_time() -> None:
    ends: dict[tuple[int, int], float] = {}
    traced = chrome_trace(cluster(), cluster="lab", missing={})["traceEvents"]
    for event in sorted((event for event in traced if event["ph"] == "X"), key=lambda event: event["ts"]):
        thread = event["pid"], event["tid"]
        assert event["ts"] >= ends.get(thread, 0)
        ends[thread] = event["ts"] + event["dur"]
    names = [(event["pid"], event["args"]["name"]) for event in traced if event["name"] == "thread_name"]
    assert names.count((1, "protect")) == 2, "two snapshots were protected at once"
    assert names.count((1, "rank 0")) == 1


def test_nothing_remembered_is_a_trace_as_well() -> None:
    empty = chrome_trace([Remembered(0, "a", NodeTrace(5, 0, ()), Offset(0, 0))], cluster="lab", missing={"b": "down"})
    assert [event["ph"] for event in empty["traceEvents"]] == ["M"] * 3
    assert empty["otherData"]["missing"] == {"b": "down"}


def test_the_summary_names_who_is_missing_and_how_exact_it_is() -> None:
    told = summary(cluster(), missing={"c": "nothing is heard from it"}, asked=["a", "b", "c"])
    assert told.splitlines() == [
        "2 of 3 nodes, 2 snapshots, 8 spans; clocks aligned to within 0.040 ms; open it in ui.perfetto.dev or "
        "chrome://tracing",
        "missing: c: nothing is heard from it",
    ]
