"""The trace event format as its document describes it, as far as our traces use it; and what viewers need besides.

"Trace Event Format" (the document that chrome://tracing and Perfetto name as theirs): the object form, complete
events (X) and metadata (M). Perfetto keeps process 0 and thread 0 for the kernel's idle threads, draws threads whose
spans overlap without nesting wrongly, and refuses a negative time.
"""

import json
import math
from typing import Any

METADATA = {
    "process_name": ("name", str),
    "process_labels": ("labels", str),
    "process_sort_index": ("sort_index", int),
    "thread_name": ("name", str),
    "thread_sort_index": ("sort_index", int),
}


def check_trace(shown: dict[str, Any]) -> None:
    """Assert that a trace is one that viewers open, and show as it was meant."""
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown
    assert shown["displayTimeUnit"] in {"ms", "ns"}
    names: set[tuple[str, int, int]] = set()
    for event in shown["traceEvents"]:
        assert {"name", "ph", "pid", "tid"} <= set(event), event
        assert type(event["pid"]) is type(event["tid"]) is int
        assert 1 <= event["pid"] < 1 << 31
        if event["ph"] == "M":
            key, kind = METADATA[event["name"]]
            assert set(event["args"]) == {key}
            assert type(event["args"][key]) is kind
            assert "ts" not in event
            names.add((event["name"], event["pid"], event["tid"] if event["name"].startswith("thread") else 0))
        else:
            _check_complete(event)
            for known in (("process_name", 0), ("thread_name", event["tid"])):
                assert (known[0], event["pid"], known[1]) in names, f"nothing names it before its first span: {event}"
    _check_nesting([event for event in shown["traceEvents"] if event["ph"] == "X"])


def _check_complete(event: dict[str, Any]) -> None:
    assert event["ph"] == "X"
    assert 1 <= event["tid"] < 1 << 31
    assert math.isfinite(event["ts"])
    assert event["ts"] >= 0
    assert event["dur"] >= 0
    assert type(event["cat"]) is type(event["name"]) is str
    assert isinstance(event["args"], dict)


def _check_nesting(events: list[dict[str, Any]]) -> None:
    open_ends: dict[tuple[int, int], list[float]] = {}
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        ends = open_ends.setdefault((event["pid"], event["tid"]), [])
        while ends and ends[-1] <= event["ts"]:
            ends.pop()
        end = event["ts"] + event["dur"]
        assert not ends or end <= ends[-1], f"it overlaps one that does not hold it whole: {event}"
        ends.append(end)
