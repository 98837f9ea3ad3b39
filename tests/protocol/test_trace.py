"""A whole trace fits in one frame, whatever is in it."""

from holdfast.protocol import frames, limits
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.trace import STAGES, NodeTrace, Span, TraceGiven


def test_the_largest_trace_fits_in_a_frame() -> None:
    largest = Span(
        stage=max(STAGES, key=len),
        job="j" * 64,
        snapshot=SnapshotId(limits.STEP_MAX, limits.STEP_MAX),
        rank=limits.WORLD_SIZE_MAX - 1,
        start_ns=limits.STEP_MAX,
        end_ns=limits.STEP_MAX,
        count=limits.STEP_MAX,
        note="n" * limits.TRACE_NOTE_CHARS_MAX,
    )
    trace = NodeTrace(limits.STEP_MAX, 0, (largest,) * limits.TRACE_SPANS_KEPT, limits.STEP_MAX)
    frame = frames.encode(TraceGiven(limits.STEP_MAX, 0, trace))
    assert len(frame) < limits.TRACE_SPANS_KEPT * limits.TRACE_SPAN_BYTES_MAX


def test_stages_have_short_names() -> None:
    assert all(len(stage) <= 16 for stage in STAGES)
