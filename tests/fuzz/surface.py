"""One way by which bytes come in: how an input is made, who hears it, and how it ends."""

import random


class Surface:
    """Makes inputs and feeds them to the code that hears such bytes; `spent_s` is that code's CPU for the last one."""

    def __init__(self, name: str, draw: random.Random) -> None:
        self.name, self.draw = name, draw
        self.spent_s = 0.0

    def make(self) -> bytes:
        """One input."""
        raise NotImplementedError

    def feed(self, made: bytes) -> str:
        """Have it heard. Returns "" if it was taken, else by which name it was refused; raises on anything else."""
        raise NotImplementedError

    def close(self) -> None:
        """Give back what it holds."""
