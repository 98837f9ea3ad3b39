"""How long the parts of something took, one after the other."""

from time import monotonic


class Laps:
    """Seconds between one lap and the next, by name."""

    def __init__(self, found: dict[str, float]) -> None:
        self._found, self._last_s = found, monotonic()

    def lap(self, name: str) -> None:
        """What took the time since the last lap was `name`."""
        now_s = monotonic()
        self._found[name], self._last_s = now_s - self._last_s, now_s
