"""What daemons say of estates: who keeps what absent nodes left, and sums of several chunks of one node.

Covers the records. What an estate is, is in `estates`; who says what when is in the daemon's core.
"""

from typing import Annotated, Literal

from holdfast.protocol import limits
from holdfast.protocol.fields import Count, JobName, Message, NodeNumber, Text
from holdfast.protocol.ids import SnapshotId
from msgspec import Meta, Struct

Absent = Annotated[tuple[NodeNumber, ...], Meta(max_length=limits.GROUP_NODES_COUNT_MAX)]  # sorted


class EstateReport(Struct, frozen=True, forbid_unknown_fields=True):
    """What a node keeps of what absent nodes of its group left of the committed snapshot; part of its heartbeat."""

    snapshot: SnapshotId
    held: Annotated[tuple[Absent, ...], Meta(max_length=limits.ESTATES_HELD_COUNT_MAX)] = ()  # whole on this node
    building: Absent = ()  # its part is being computed
    done_chunks: Count = 0  # of what is being built
    total_chunks: Count = 0
    problem: Text = ""  # why the group is not protected again


class SumTerm(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What somebody else sends for a sum, and the factor with which it enters."""

    number: Count  # of the part that sends it
    node: NodeNumber  # who sends it
    factor: Annotated[int, Meta(ge=1, le=255)]


class MixChunk(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One chunk that a node holds, and its factor in GF(2^8)."""

    kind: Literal["data", "parity", "estate"]
    chunk: Count
    factor: Annotated[int, Meta(ge=1, le=255)]


class MixPart(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What one node does for one sum, as `SumPart`, but with several of its chunks, each times its own factor."""

    number: Count
    chunks: Annotated[tuple[MixChunk, ...], Meta(min_length=1, max_length=limits.MIX_CHUNKS_MAX)]
    target: NodeNumber
    gathers: Annotated[tuple[SumTerm, ...], Meta(max_length=limits.MIX_CHUNKS_MAX)] = ()
    witness: bool = False  # also tell who wants it the fingerprint of what these chunks add


class MixesWanted(Message, frozen=True):
    """Please take part in these sums, as in `SumsWanted`. `absent` names the estate that chunks of it are of."""

    job: JobName
    snapshot: SnapshotId
    absent: Absent
    parts: Annotated[tuple[MixPart, ...], Meta(max_length=limits.SUMS_PER_MESSAGE_COUNT_MAX)]
