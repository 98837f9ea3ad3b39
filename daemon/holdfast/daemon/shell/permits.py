"""What a trainer over the network may read and write of the arena, learned from its conversation with the daemon.

A trainer on the node maps whole images. One that isn't there has its bytes moved by the gate, which holds it to less:
it writes its own shard, from the grant to the seal, and reads what was opened for it, until it closes that. Covers
who may touch what; moving bytes is `shell.remote`'s. Takes messages as they pass; knows no socket.
"""

from dataclasses import dataclass, field
from typing import TypeVar

from holdfast.protocol import limits, messages
from holdfast.protocol.ids import SnapshotId

OPEN_COUNT_MAX = 4 + limits.RANGES_PER_CLIENT_COUNT_MAX  # of each kind: slots under way, shards opened, ranges lent

Key = TypeVar("Key")
Value = TypeVar("Value")
Place = tuple[str, int, int]  # job, slot, generation: one piece of memory


@dataclass(frozen=True, slots=True)
class Permit:
    """Bytes of one piece of memory.

    Attributes:
        start, end: from the memory's first byte.
    """

    place: Place
    start: int
    end: int


@dataclass(slots=True)
class Permits:
    """Of one trainer."""

    writing: dict[SnapshotId, Permit] = field(default_factory=dict)
    reading: dict[SnapshotId | int, Permit] = field(default_factory=dict)  # by snapshot, or by a range's request
    _shards: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)  # (job, attempt) -> from, to

    def told(self, message: messages.DaemonMessage) -> None:
        """The daemon tells the trainer something."""
        match message:
            case messages.PlanAccepted(job, attempt, _, offset_bytes, shard_bytes):
                _keep(self._shards, (job, attempt), (offset_bytes, offset_bytes + shard_bytes))
            case messages.Granted(job, snapshot, slot, generation):
                shard = self._shards.get((job, snapshot.attempt))
                if shard is not None:
                    _keep(self.writing, snapshot, Permit((job, slot, generation), *shard))
            case messages.ShardOpened():
                place = (message.job, message.slot, message.generation)
                _keep(self.reading, message.snapshot, Permit(place, *message.bytes_read))
            case messages.RangeReady(request, job, slot, generation, offset_bytes, length_bytes):
                end = offset_bytes + length_bytes
                _keep(self.reading, request, Permit((job, slot, generation), offset_bytes, end))
            case _:
                pass  # speaks of no memory

    def said(self, message: messages.ClientMessage) -> None:
        """The trainer says something to the daemon: what it is done with, it may not touch again."""
        match message:
            case messages.Seal(_, snapshot) | messages.Skip(_, snapshot):
                self.writing.pop(snapshot, None)
            case messages.CloseShard(_, snapshot):
                self.reading.pop(snapshot, None)
            case messages.CloseRange(request):
                self.reading.pop(request, None)
            case _:
                pass

    def may_write(self, place: Place, start: int, end: int) -> bool:
        """Whether these bytes are of a shard that the trainer is staging."""
        return any(one.place == place and one.start <= start < end <= one.end for one in self.writing.values())

    def may_read(self, place: Place, start: int, end: int) -> bool:
        """Whether these bytes were opened or lent."""
        return any(one.place == place and one.start <= start < end <= one.end for one in self.reading.values())


def _keep(known: dict[Key, Value], key: Key, value: Value) -> None:
    """Add one; the oldest goes where there are too many."""
    known.pop(key, None)
    known[key] = value
    while len(known) > OPEN_COUNT_MAX:
        known.pop(next(iter(known)))
