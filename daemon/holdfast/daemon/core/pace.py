"""How long a training step takes, how long a snapshot, and whether ranks wait: measured on one node for one job.

Covers measuring. What follows from it for all nodes is in `Cadences`. Times are read from the events' clock.
"""

from dataclasses import dataclass, field

from holdfast.protocol.ids import SnapshotId

_NEW_SHARE = 0.3  # of the newest measurement in a running mean: three or four of them outweigh the past


@dataclass(slots=True)
class Pace:
    """Running means, in seconds; 0.0 before the first measurement."""

    step_s: float = 0.0  # of one training step, without waiting for a slot
    cycle_s: float = 0.0  # from a snapshot's first grant here to its commit
    waited_s: float = 0.0  # the longest wait for a slot of the newest snapshot granted here
    newest: SnapshotId | None = None  # the newest that was granted here
    asked_ns: dict[int, int] = field(default_factory=dict)  # role -> when it asked for the slot that it waits for
    trains_since: dict[int, tuple[int, int]] = field(default_factory=dict)  # role -> (step, when that was granted)
    opened_ns: dict[SnapshotId, int] = field(default_factory=dict)  # first grant of what is not committed yet

    def begun(self, role: int, step: int, wished_ns: int) -> None:
        """A rank wants to stage a step, since `wished_ns`: it has trained from its last grant until then."""
        before = self.trains_since.pop(role, None)
        if before is not None and step > before[0] and wished_ns > before[1]:
            self.step_s = _mean(self.step_s, (wished_ns - before[1]) / 1e9 / (step - before[0]))
        self.asked_ns[role] = wished_ns

    def granted(self, role: int, snapshot: SnapshotId, now_ns: int) -> None:
        """It got its slot."""
        waited_s = (now_ns - self.asked_ns.pop(role, now_ns)) / 1e9
        self.waited_s = waited_s if snapshot != self.newest else max(waited_s, self.waited_s)
        self.newest = snapshot
        self.trains_since[role] = snapshot.step, now_ns
        self.opened_ns.setdefault(snapshot, now_ns)

    def committed(self, snapshot: SnapshotId, now_ns: int) -> None:
        """A snapshot is committed, as far as this node knows."""
        opened_ns = self.opened_ns.get(snapshot)
        if opened_ns is not None:
            self.cycle_s = _mean(self.cycle_s, (now_ns - opened_ns) / 1e9)
        self.opened_ns = {other: opened for other, opened in self.opened_ns.items() if other > snapshot}


def _mean(known_s: float, measured_s: float) -> float:
    return measured_s if known_s == 0.0 else known_s + _NEW_SHARE * (measured_s - known_s)
