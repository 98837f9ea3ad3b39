"""What a restarted worker must know of the memory that its keeper still holds.

Covers the record and its bytes. The shell keeps two checksummed copies in held memory and writes them in turn, so that
a worker that dies while writing leaves the other copy whole.
"""

from typing import Literal

import msgspec
from holdfast.protocol import limits
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.layout import Layout
from msgspec import UNSET, UnsetType

Phase = Literal["absent", "allocating", "empty", "staging", "sealed", "protected", "committed", "rebuilding"]


class SlotRecord(msgspec.Struct, frozen=True):
    """One slot of one job."""

    generation: int
    phase: Phase
    snapshot: SnapshotId | None
    layout_id: int | None  # the layout for which its memory is sized


class EstateRecord(msgspec.Struct, frozen=True):
    """A part of what absent nodes left, whole in held memory."""

    slot: int
    generation: int
    snapshot: SnapshotId
    layout_id: int
    absent: tuple[int, ...]


class JobRecord(msgspec.Struct, frozen=True):
    """One job on this node."""

    name: str
    attempt: int
    current_layout_id: int | None
    layouts: tuple[Layout, ...]
    committed: SnapshotId | None
    committed_layout_id: int | None
    given_up: tuple[SnapshotId, ...]
    slots: tuple[SlotRecord, ...]
    closed: bool
    estates: tuple[EstateRecord, ...] | UnsetType = UNSET  # not said where there are none

    def __post_init__(self) -> None:
        known = {layout.layout_id for layout in self.layouts}
        if self.current_layout_id not in {None, *known}:
            raise ValueError(f"job {self.name}: expected one of its {len(known)} layouts to be the current one")
        held = [slot.snapshot for slot in self.slots if slot.snapshot is not None]
        if len(held) != len(set(held)):
            raise ValueError(f"job {self.name}: two slots hold the same snapshot")


class LedgerRecord(msgspec.Struct, frozen=True):
    """Everything, with enough identity that memory of another node or cluster is never taken for ours."""

    cluster: str
    epoch: int
    node: int
    incarnation: int
    worker_session: int
    jobs: tuple[JobRecord, ...] = ()
    incarnations: tuple[int, ...] = ()  # the highest heard of each node, so that one that is superseded stays refused

    def __post_init__(self) -> None:
        names = {job.name for job in self.jobs}
        if len(names) != len(self.jobs) or len(names) > limits.JOB_COUNT_MAX:
            raise ValueError(f"expected at most {limits.JOB_COUNT_MAX} jobs of different names, found {len(self.jobs)}")


_decoder = msgspec.msgpack.Decoder(LedgerRecord)


def encode_ledger(record: LedgerRecord) -> bytes:
    """The bytes of a record."""
    return msgspec.msgpack.encode(record)


def decode_ledger(payload: bytes) -> LedgerRecord:
    """The record of bytes; raises msgspec.DecodeError (of which ValidationError is one) for anything else."""
    try:
        return _decoder.decode(payload)
    except (ValueError, RecursionError) as error:  # the codec lets them through
        raise msgspec.DecodeError(str(error)) from error
