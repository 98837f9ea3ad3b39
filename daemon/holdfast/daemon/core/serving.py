"""What a node gives to a peer that lacks it: layouts, digest tables, chunks of complete snapshots."""

from itertools import takewhile

from holdfast.daemon.core.actions import ServeChunk
from holdfast.daemon.core.context import Context
from holdfast.daemon.core.job import Job
from holdfast.daemon.core.slot import COMPLETE
from holdfast.protocol import limits, messages
from holdfast.protocol.frames import pack_digests
from holdfast.protocol.ids import SnapshotId


def send_layout(ctx: Context, node: int, job: Job, layout_id: int) -> None:
    """Send a layout that a peer does not know."""
    layout = job.layouts.get(layout_id)
    if layout is not None:
        current = job.planned and layout_id == job.current
        ctx.tell(node, messages.LayoutAnnounced(job.name, job.attempt, layout, current))


def send_digests(ctx: Context, node: int, job: Job, snapshot: SnapshotId) -> None:
    """Send the known data digests of the group: a peer missed some, or must check what it rebuilds."""
    slot = job.slot_of(snapshot)
    if slot is None or slot.geometry is None or (slot.phase not in COMPLETE and slot.transfer is None):
        return
    for member, count in enumerate(slot.geometry.stripes(slot.node).chunk_counts):
        for first in range(0, count, limits.DIGESTS_PER_MESSAGE_MAX):
            start = slot.digest_index(member, first)
            end = start + min(limits.DIGESTS_PER_MESSAGE_MAX, count - first)
            known = list(takewhile(lambda digest: digest is not None, slot.digests[start:end]))
            packed = pack_digests([digest for digest in known if digest is not None])
            owner = slot.geometry.group_of(slot.node)[member]
            if packed:
                ctx.tell(node, messages.DigestsAnnounced(job.name, snapshot, owner, first, packed))


def serve_chunk(ctx: Context, node: int, job: Job, wanted: messages.ReadChunk) -> None:
    """Send a chunk of a complete snapshot to a peer that rebuilds, or say why not."""
    slot = job.slot_of(wanted.snapshot)
    if slot is None or slot.phase not in COMPLETE or slot.geometry is None:
        text = f"{wanted.snapshot} is not held here"
        ctx.tell(
            node,
            messages.ChunkUnavailable(job.name, wanted.snapshot, wanted.kind, wanted.chunk, text),
        )
        return
    me = slot.geometry.group_of(slot.node).index(slot.node)
    if wanted.kind == "data":
        count, start = (
            slot.geometry.stripes(slot.node).chunk_counts[me],
            slot.digest_index(me, 0),
        )
    else:
        count = slot.sizes.parity_bytes // slot.geometry.chunk_bytes
        start = slot.parity_digest_index(0)
    digest = slot.digests[start + wanted.chunk] if wanted.chunk < count else None
    if digest is None:
        text = f"{wanted.kind} chunk {wanted.chunk} is beyond the {count} held here"
        ctx.tell(
            node,
            messages.ChunkUnavailable(job.name, wanted.snapshot, wanted.kind, wanted.chunk, text),
        )
        return
    header = messages.ChunkHeader(
        cluster=ctx.config.cluster_name,
        epoch=ctx.config.epoch,
        sender=ctx.node,
        incarnation=ctx.incarnation,
        job=job.name,
        snapshot=wanted.snapshot,
        node=ctx.node,
        kind=wanted.kind,
        chunk=wanted.chunk,
        reading=True,
    )
    offset_bytes = wanted.chunk * slot.geometry.chunk_bytes
    ctx.emit(ServeChunk(node, slot.memory(job.name), header, offset_bytes, digest))
