"""What a placement is worth: odds of losing state, memory, traffic, and how often to take a snapshot. Pure formulas.

Covers capacity planning with a few numbers per cluster. Node losses are taken as independent: what fails together
belongs in one failure domain, and whole domains fail more often than these odds say.

Sources:
    REFT: "Reliable and Efficient In-Memory Fault Tolerance of Large Language Model Pretraining", section on survival
        and its public notebook: binomial groups, Weibull node losses.
    Young: "A First Order Approximation to the Optimum Checkpoint Interval", CACM 17(9), 1974.
    Daly: "A Higher Order Estimate of the Optimum Checkpoint Interval for Restart Dumps", FGCS 22(3), 2006.
    Chen et al.: "RAID: High-Performance, Reliable Secondary Storage", ACM Computing Surveys 26(2), 1994: loss while a
        repair is under way.
"""

import math
from collections import Counter
from collections.abc import Sequence

HOURS_PER_DAY = 24.0
HOURS_PER_YEAR = 24.0 * 365.25


def exponential_loss(time_h: float, *, mtbf_h: float) -> float:
    """Probability that one node is lost within `time_h` hours, losses at a constant rate: F = 1 - exp(-t / MTBF).

    Args:
        time_h: hours, 0 or more.
        mtbf_h: mean hours between losses of one node, above 0.
    """
    return -math.expm1(-time_h / mtbf_h)


def weibull_loss(time: float, *, scale: float, shape: float) -> float:
    """Probability that one node is lost by `time`, with age: F = 1 - exp(-(t / scale)^shape). REFT uses 50 and 3.

    `time` and `scale` have one unit, whichever it is.
    """
    return -math.expm1(-((time / scale) ** shape))


def group_loss(node_loss: float, *, size: int, parity: int) -> float:
    """Probability that more than `parity` of the `size` members of a group are lost: the binomial's upper tail.

    Summed from the tail itself, so that one in 10^15 is not lost in the rounding of 1 - survival.

    Args:
        node_loss: probability that a given node is lost (F), 0 to 1; losses are independent.
        size: members of the group (n).
        parity: losses that it survives (m).
    """
    tail = range(parity + 1, size + 1)
    return math.fsum(math.comb(size, lost) * node_loss**lost * (1 - node_loss) ** (size - lost) for lost in tail)


def cluster_survival(node_loss: float, *, group_sizes: Sequence[int], parity: int) -> float:
    """Probability that no group loses more than `parity` members.

    REFT: (sum over i <= m of C(n, i) F^i (1 - F)^(n - i)) ^ (N / n); ragged groups multiply their own terms.
    """
    survivals = (1 - group_loss(node_loss, size=size, parity=parity) for size in group_sizes)
    return math.prod(survivals)


def survival_of_losses(lost_count: int, *, group_sizes: Sequence[int], parity: int) -> float:
    """Probability that nothing is lost when exactly `lost_count` nodes, any ones, are gone at once.

    By counting: the coefficient of x^lost in the product over groups of (sum over i <= m of C(n, i) x^i), divided by
    C(N, lost). Exact up to the last division. Cost: O(groups * lost_count * parity) integer operations.
    """
    survivable = [1] + [0] * lost_count
    for size in group_sizes:
        term = [math.comb(size, lost) for lost in range(min(parity, size) + 1)]
        survivable = [
            sum(term[here] * survivable[total - here] for here in range(min(len(term), total + 1)))
            for total in range(lost_count + 1)
        ]
    return survivable[lost_count] / math.comb(sum(group_sizes), lost_count)


def losses_expected(time_h: float, *, group_sizes: Sequence[int], parity: int, mtbf_h: float, repair_h: float) -> float:
    """Expected number of times that state is lost in `time_h` hours of a cluster that repairs itself.

    The RAID argument (Chen et al.): a node is lost, and `parity` or more of the other members follow before the repair
    is done. Per group: T * n / MTBF * P(Binomial(n - 1, 1 - exp(-W / MTBF)) >= m). First order: every loss opens a
    window of its own, so the result is slightly too high, never too low, for windows much shorter than MTBF / n.

    Args:
        time_h: hours.
        group_sizes: members of each group.
        parity: losses that each group survives (m).
        mtbf_h: mean hours between losses of one node.
        repair_h: hours from a loss until the slot is rebuilt elsewhere (W).
    """
    node_loss = exponential_loss(repair_h, mtbf_h=mtbf_h)
    return math.fsum(
        count * time_h * size / mtbf_h * group_loss(node_loss, size=size - 1, parity=parity - 1)
        for size, count in Counter(group_sizes).items()
    )


def loss_probability(expected: float) -> float:
    """Probability of at least one of rare, independent events of which `expected` are expected (Poisson)."""
    return -math.expm1(-expected)


def young_interval_s(snapshot_s: float, *, mtbf_s: float) -> float:
    """Seconds between snapshots that waste the least: sqrt(2 C M) (Young 1974).

    Args:
        snapshot_s: how long one snapshot blocks training (C), seconds.
        mtbf_s: mean seconds between losses of the whole job (M): a node's divided by the number of nodes.
    """
    return math.sqrt(2 * snapshot_s * mtbf_s)


def daly_interval_s(snapshot_s: float, *, mtbf_s: float) -> float:
    """Seconds of training between snapshots, Daly's higher order (2006).

    sqrt(2 C M) * (1 + sqrt(C / 2M) / 3 + (C / 2M) / 9) - C for C < 2 M, else M. Within a percent of Young's where
    snapshots are cheap; right where they are not. The snapshot's own time is not part of it.
    """
    if snapshot_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = snapshot_s / (2 * mtbf_s)
    first_order = young_interval_s(snapshot_s, mtbf_s=mtbf_s)
    return first_order * (1 + math.sqrt(ratio) / 3 + ratio / 9) - snapshot_s


def waste(interval_s: float, *, snapshot_s: float, mtbf_s: float, restart_s: float = 0.0) -> float:
    """Part of the time that is no progress: C / tau + (tau / 2 + R) / M, first order, at most 1.

    Args:
        interval_s: seconds between snapshots (tau).
        snapshot_s: how long one blocks training (C).
        mtbf_s: mean seconds between losses of the job (M).
        restart_s: from a loss until training goes on (R).
    """
    return min(snapshot_s / interval_s + (interval_s / 2 + restart_s) / mtbf_s, 1.0)


def memory_factor(*, size: int, parity: int) -> float:
    """Bytes that a node holds per byte of its image and slot: 1 + m / (n - m)."""
    return 1 + parity / (size - parity)


def held_bytes(image_bytes: int, *, size: int, parity: int, slots: int) -> int:
    """Memory that a node's arena needs for snapshots: slots * image * (1 + m / (n - m)), rounded up.

    Args:
        image_bytes: the node's shards of one snapshot; images of a group are taken as equal.
        size: members of the group (n).
        parity: losses that it survives (m).
        slots: snapshots that there is room for.
    """
    parity_bytes = -(-image_bytes * parity // (size - parity))
    return slots * (image_bytes + parity_bytes)


def sent_bytes(image_bytes: int, *, parity: int) -> int:
    """Bytes that a node sends per snapshot, m * image; it receives as many: each data chunk goes to m holders."""
    return parity * image_bytes


def rebuilt_bytes(image_bytes: int, *, size: int, parity: int) -> int:
    """Bytes that a replacement receives to hold one snapshot again: its image and its parity, once each."""
    return held_bytes(image_bytes, size=size, parity=parity, slots=1)
