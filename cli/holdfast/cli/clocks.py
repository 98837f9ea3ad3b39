"""How the clocks of nodes lie to one another, from questions and answers.

Pure. A node read its clock after it was asked and before its answer came: so its clock is ahead of the asker's by
something between (what it read - when the answer came) and (what it read - when it was asked). Every further question
narrows that; no assumption is made about the way there and back. Clocks of different machines drift apart by some tens
of microseconds per second: what lies long before the questions is less exact by that much.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from holdfast.protocol.trace import TraceAnswer


@dataclass(frozen=True, slots=True)
class Offset:
    """How far a node's clock is ahead of the asker's, and by how much that may be wrong, either way."""

    ahead_ns: int
    error_ns: int


def offset(answers: Iterable[TraceAnswer]) -> Offset | None:
    """What the answers of one node say together; None if it gave none.

    The bounds are those of all answers together. Where they exclude one another (a clock that was set, or a machine
    that slept in between), the narrowest answer counts alone.
    """
    bounds = [
        (answer.trace.now_ns - answer.heard_ns, answer.trace.now_ns - answer.asked_ns)
        for answer in answers
        if answer.trace is not None
    ]
    if not bounds:
        return None
    low, high = max(low for low, _ in bounds), min(high for _, high in bounds)
    if low > high:
        low, high = min(bounds, key=lambda bound: bound[1] - bound[0])
    return Offset(ahead_ns=(low + high) // 2, error_ns=(high - low + 1) // 2)
