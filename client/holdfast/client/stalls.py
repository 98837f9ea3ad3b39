"""How long training was held up, and by what.

Training thread only. Between `begin` and `end` every moment belongs to exactly one part, so the parts add up to the
whole. What is measured outside of them (a restore, `wait`, `close`) is nobody's stall and is dropped.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

# What training waits for:
#   slot     the staging thread, and the daemon's room for a snapshot
#   copy     the copy of a snapshot under way; with a GPU only until the GPU has been given the work
#   plan     the agreement of the ranks on a layout, and its memory
#   capture  the look at the state, and the copy of what may change before the next update
#   enqueue  handing the snapshot to the staging thread
#   other    the rest: the step hook's own code
PARTS = ("slot", "copy", "plan", "capture", "enqueue", "other")


class Stalls:
    """Seconds by part: since the last `step`, and in all."""

    def __init__(self) -> None:
        self.last_s = 0.0
        self.total_s = 0.0
        self._last = dict.fromkeys(PARTS, 0.0)
        self._total = dict.fromkeys(PARTS, 0.0)
        self._part = "other"  # that the present moment belongs to
        self._told_s = 0.0
        self._began_s: float | None = None  # None: training is not held up now
        self._mark_s = 0.0  # everything before belongs to some part

    def begin(self, *, step: bool) -> None:
        """Training is held up from now on. `step`: for the next snapshot's sake, so counting starts anew."""
        if step:
            self.last_s, self._last = 0.0, dict.fromkeys(PARTS, 0.0)
        self._began_s = self._mark_s = monotonic()

    def end(self) -> None:
        """Training goes on."""
        assert self._began_s is not None
        held_s = self._lap(self._part) - self._began_s
        self._began_s = None
        self.last_s += held_s
        self.total_s += held_s

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What takes time inside is `name`."""
        self._lap(self._part)
        around, self._part = self._part, name
        try:
            yield
        finally:
            self._lap(name)
            self._part = around

    def waited(self, granted_s: float | None) -> None:
        """It was a snapshot under way that training waited for: for its slot, then for its copy.

        Args:
            granted_s: When the slot was there, by `monotonic`; None: it is not yet.
        """
        now_s = monotonic()
        self._lap("slot", until_s=now_s if granted_s is None else min(max(granted_s, self._mark_s), now_s))
        self._lap("copy")

    def take_untold_s(self) -> float:
        """How long training was held up since this was asked last; each moment is told once."""
        known_s = self.total_s + (monotonic() - self._began_s if self._began_s is not None else 0.0)
        untold_s, self._told_s = known_s - self._told_s, known_s
        return max(untold_s, 0.0)

    def parts(self) -> dict[str, dict[str, float]]:
        """The `last` and `total` seconds of each part."""
        return {"last": dict(self._last), "total": dict(self._total)}

    def _lap(self, name: str, *, until_s: float | None = None) -> float:
        now_s = monotonic() if until_s is None else until_s
        if self._began_s is not None:
            took_s, self._mark_s = now_s - self._mark_s, now_s
            self._last[name] += took_s
            self._total[name] += took_s
        return now_s
