"""Time and chance of a simulated cluster: one heap ordered by (instant, sequence), one generator from one seed."""

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

NS_PER_S = 1_000_000_000
TRANSCRIPT_LINES_MAX = 60_000  # of a run's transcript; older lines go first


@dataclass(slots=True)
class World:
    """The only source of time, order and chance."""

    seed: int
    now_ns: int = 0
    event_count: int = 0
    notes: list[tuple[int, tuple[object, ...]]] = field(
        default_factory=list
    )  # (instant, what is said); said when asked
    random: Random = field(init=False)
    _heap: list[tuple[int, int, Callable[[], None]]] = field(default_factory=list)
    _sequence: "itertools.count[int]" = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.random = Random(self.seed)

    @property
    def now_s(self) -> float:
        """Seconds since the world began."""
        return self.now_ns / NS_PER_S

    def at(self, instant_ns: int, what: Callable[[], None]) -> None:
        """Have `what` happen at an instant, after everything that was planned for the same one before."""
        heapq.heappush(self._heap, (max(instant_ns, self.now_ns), next(self._sequence), what))

    def after(self, seconds: float, what: Callable[[], None]) -> None:
        """Have `what` happen `seconds` from now."""
        self.at(self.now_ns + int(seconds * NS_PER_S), what)

    def run_until(self, done: Callable[[], bool], *, deadline_s: float) -> bool:
        """Let time pass until `done()`, at most to `deadline_s`. Returns whether it is done."""
        while not done():
            if not self._heap or self._heap[0][0] > deadline_s * NS_PER_S:
                self.now_ns = max(self.now_ns, int(deadline_s * NS_PER_S))
                return done()
            self.now_ns, _, what = heapq.heappop(self._heap)
            self.event_count += 1
            what()
        return True

    def chance(self, probability: float) -> bool:
        """Whether something of this probability happens now."""
        return self.random.random() < probability

    def between(self, low: float, high: float) -> float:
        """A number between two."""
        return self.random.uniform(low, high)

    def note(self, *parts: object) -> None:
        """A line of the transcript; its parts, frozen ones, become text only when somebody reads it."""
        if len(self.notes) >= TRANSCRIPT_LINES_MAX:
            del self.notes[: TRANSCRIPT_LINES_MAX // 2]
        self.notes.append((self.now_ns, parts))

    @property
    def transcript(self) -> list[str]:
        """All lines that are kept."""
        return [f"{now_ns / NS_PER_S:10.4f} {''.join(map(str, parts))}" for now_ns, parts in self.notes]
