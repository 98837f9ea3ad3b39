"""A record of node losses, replayed against a placement: what would have been survived. Pure.

Covers the trace's text and its replay. A lost node is back after a fixed time; the state is lost when more than
`parity` members of one group are away at the same time, and is then taken to be there again at once (from a durable
copy), with those nodes still away.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

TRACE_LINES_MAX = 1_000_000  # ten years of a loss every five minutes


@dataclass(frozen=True, slots=True)
class Loss:
    """One node was lost.

    Attributes:
        time_h: hours since the record began.
        node: index in the placement.
    """

    time_h: float
    node: int


@dataclass(frozen=True, slots=True)
class Replay:
    """What a trace would have done.

    Attributes:
        node_losses: that the trace has.
        hours: from its beginning to its last loss.
        worst: most members of one group that were away at the same time.
        state_losses: times, in hours, at which more than parity covers were away.
    """

    node_losses: int
    hours: float
    worst: int
    state_losses: tuple[float, ...]


def read_trace(text: str, *, node_count: int) -> list[Loss]:
    """Read lines "HOURS,NODE" or "HOURS NODE", in order of time. Blank lines and those that begin with # don't count.

    Raises:
        ValueError: what is wrong, with the line's number; words that follow the file's name.
    """
    losses: list[Loss] = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.replace(",", " ").split()
        if not words or words[0].startswith("#"):
            continue
        try:
            time_h, node = float(words[0]), int(words[1])
        except (ValueError, IndexError):
            time_h, node = math.nan, -1
        if len(words) != 2 or not math.isfinite(time_h) or time_h < 0:
            raise ValueError(f"line {number}: expected HOURS,NODE such as 12.5,3; found {line[:60]!r}")
        if not 0 <= node < node_count:
            raise ValueError(f"line {number}: expected a node from 0 to {node_count - 1}, found {node}")
        if losses and time_h < losses[-1].time_h:
            raise ValueError(f"line {number}: expected a time of at least {losses[-1].time_h:g} h, found {time_h:g} h")
        if len(losses) == TRACE_LINES_MAX:
            raise ValueError(f"line {number}: expected at most {TRACE_LINES_MAX} losses")
        losses.append(Loss(time_h, node))
    if not losses:
        raise ValueError("expected lines HOURS,NODE, found none")
    return losses


def replay(trace: Sequence[Loss], *, groups: Sequence[Sequence[int]], parity: int, repair_h: float) -> Replay:
    """Let the nodes be lost as the trace says, each to be back `repair_h` hours later.

    A node that is lost again while it is away is away for `repair_h` from then on.
    """
    group_of = {node: index for index, group in enumerate(groups) for node in group}
    back_h: list[dict[int, float]] = [{} for _ in groups]  # by group: node that is away -> when it is back
    worst = 0
    state_losses: list[float] = []
    for loss in trace:
        away = back_h[group_of[loss.node]]
        for node in [node for node, until_h in away.items() if until_h <= loss.time_h]:
            del away[node]
        before = len(away)
        away[loss.node] = loss.time_h + repair_h
        worst = max(worst, len(away))
        if len(away) > parity and len(away) > before:
            state_losses.append(loss.time_h)
    return Replay(len(trace), trace[-1].time_h if trace else 0.0, worst, tuple(state_losses))
