"""What both sides of a sum need: a resting chunk as a term of it, and the header and name of its frame."""

from typing import Literal

from holdfast.daemon.core.actions import OwnTerm
from holdfast.daemon.core.context import Context
from holdfast.daemon.core.memory import ChunkKey
from holdfast.daemon.core.slot import Slot
from holdfast.protocol import messages
from holdfast.protocol.ids import SnapshotId


def own_term(slot: Slot, job: str, *, kind: Literal["data", "parity"], chunk: int, factor: int) -> OwnTerm | None:
    """A chunk of a complete slot as a term of a sum; None if there is no such chunk."""
    assert slot.geometry is not None
    if kind == "data":
        me = slot.geometry.group_of(slot.node).index(slot.node)
        count, start = slot.geometry.stripes(slot.node).chunk_counts[me], slot.digest_index(me, 0)
    else:
        count, start = slot.sizes.parity_bytes // slot.geometry.chunk_bytes, slot.parity_digest_index(0)
    digest = slot.digests[start + chunk] if chunk < count else None
    return None if digest is None else OwnTerm(slot.memory(job), kind, chunk, digest, factor)


def sum_header(ctx: Context, job: str, snapshot: SnapshotId, *, wanter: int, number: int) -> messages.ChunkHeader:
    """The header of a sum that leaves this node."""
    return messages.ChunkHeader(
        cluster=ctx.config.cluster_name,
        epoch=ctx.config.epoch,
        sender=ctx.node,
        incarnation=ctx.incarnation,
        job=job,
        snapshot=snapshot,
        node=wanter,
        kind="sum",
        chunk=number,
        reading=True,
    )


def key_of_sum(header: messages.ChunkHeader) -> ChunkKey:
    """The name under which the shell keeps the frame of a sum."""
    snapshot = header.snapshot
    return ChunkKey(header.job, snapshot.attempt, snapshot.step, header.node, header.kind, header.chunk, header.reading)
