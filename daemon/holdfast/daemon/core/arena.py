"""The memory budget of one node: what is reserved, and what may still be.

Covers numbers only; the shell makes and frees the bytes. Invariant: reserved never exceeds the budget.
"""

from dataclasses import dataclass, field

from holdfast.daemon.core.memory import Memory


@dataclass(slots=True)
class Arena:
    """Reservations against an agreed budget, in bytes."""

    budget_bytes: int
    reserved: dict[Memory, int] = field(default_factory=dict)

    @property
    def reserved_bytes(self) -> int:
        """All that is reserved now."""
        return sum(self.reserved.values())

    def refusal(self, needed_bytes: int, *, free_bytes: int) -> str | None:
        """Why `needed_bytes` more can't be had, with the numbers; None if they can."""
        allowed_bytes = self.budget_bytes - self.reserved_bytes
        if needed_bytes <= min(allowed_bytes, free_bytes):
            return None
        return (
            f"needed {needed_bytes} bytes, allowed {allowed_bytes} (budget {self.budget_bytes}, reserved "
            f"{self.reserved_bytes}), free on this machine {free_bytes}; raise memory.budget, lower memory.slots, "
            f"use more nodes, or free a finished job with 'holdfast forget JOB'"
        )

    def reserve(self, memory: Memory, reserved_bytes: int) -> None:
        """Book memory; `refusal` was asked before."""
        assert memory not in self.reserved
        self.reserved[memory] = reserved_bytes
        self.check()

    def release(self, memory: Memory) -> None:
        """Give a booking back."""
        del self.reserved[memory]

    def check(self) -> None:
        """Assert the invariant named at the top of this file."""
        assert self.reserved_bytes <= self.budget_bytes
