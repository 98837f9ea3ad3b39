"""What a daemon must now do. Imperatives; the shell carries them out in order and nothing else.

The order carries meaning: a `WriteLedger` before a `SendPeer` is done before it.
"""

from dataclasses import dataclass
from typing import Literal

from holdfast.daemon.core.health import Resting
from holdfast.daemon.core.ledger import LedgerRecord
from holdfast.daemon.core.memory import ChunkKey, Memory, Sizes
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.layout import Layout
from holdfast.protocol.messages import ChunkHeader, DaemonMessage, PeerMessage
from holdfast.protocol.recovery import RecoveryRecord


@dataclass(frozen=True, slots=True)
class DialPeer:
    """Open the connections to a node; harmless when they are open."""

    node: int


@dataclass(frozen=True, slots=True)
class SendPeer:
    """Send a message to a dialled node. May be lost; the core repeats what matters."""

    node: int
    message: PeerMessage


@dataclass(frozen=True, slots=True)
class ReplyClient:
    """Send a message to a trainer or command."""

    client: int
    message: DaemonMessage


@dataclass(frozen=True, slots=True)
class GiveMemory:
    """Hand a slot's data memory to a trainer, as a descriptor."""

    client: int
    memory: Memory
    data_bytes: int


@dataclass(frozen=True, slots=True)
class DropClient:
    """Close a client's connection."""

    client: int
    reason: str


@dataclass(frozen=True, slots=True)
class Allocate:
    """Make, populate and seal a slot's memory; ends in MemoryReady or MemoryFailed.

    Attributes:
        memory: the slot's.
        sizes: of its parts.
        layout: of the shards that ranks of this node will write there; None: no rank will.
    """

    memory: Memory
    sizes: Sizes
    layout: Layout | None = None


@dataclass(frozen=True, slots=True)
class Free:
    """Give a slot's memory back. Work on it that is still queued must do no harm."""

    memory: Memory


@dataclass(frozen=True, slots=True)
class DigestChunks:
    """Digest data chunks of the own image; ends in ChunksDigested."""

    memory: Memory
    snapshot: SnapshotId  # said again in the result: the memory may hold another one by then
    first_chunk: int
    count: int


@dataclass(frozen=True, slots=True)
class StoreDigests:
    """Write digests into the slot's digest table, from index `first` on."""

    memory: Memory
    first: int
    digests: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SendChunk:
    """Send a data chunk to a parity holder, straight from the arena."""

    node: int
    memory: Memory
    header: ChunkHeader


@dataclass(frozen=True, slots=True)
class ServeChunk:
    """Send a resting chunk, if it has its digest, to a peer that rebuilds; ends in nothing or ChunkNotServed."""

    node: int
    memory: Memory
    header: ChunkHeader
    offset_bytes: int  # within data or, for parity, within guard
    digest: int


@dataclass(frozen=True, slots=True)
class OwnTerm:
    """A chunk of held memory, and the factor with which it enters a sum in GF(2^8)."""

    memory: Memory
    kind: Literal["data", "parity"]
    chunk: int  # where it lies, in chunks
    digest: int  # that it must have
    factor: int


@dataclass(frozen=True, slots=True)
class AddToSum:
    """Add up own chunks and what was gathered for a sum, and send the result to `node`.

    Ends in nothing or, with `witness`, in SumAdded; in SumNotAdded if a chunk fails its digest or anything is gone.
    The received frames are dropped afterwards.
    """

    node: int
    header: ChunkHeader  # of what is sent; its digest is filled in
    own: OwnTerm
    incoming: tuple[tuple[int, ChunkKey], ...]  # (factor, frame); none: the chunk goes out, times its factor
    witness: int  # the factor for its fingerprint; 0: nobody wants it
    more: tuple[OwnTerm, ...] = ()  # own chunks beside the first; each is vouched for with its own factor


@dataclass(frozen=True, slots=True)
class StoreSum:
    """Put a sum that arrived, with own chunks added, where it is wanted; ends in SumStored or SumNotStored.

    The received frame is dropped afterwards.
    """

    memory: Memory
    number: int
    kind: Literal["data", "parity"]
    chunk: int  # where it goes, in chunks
    incoming: ChunkKey | None
    own: tuple[OwnTerm, ...]
    witness: bool  # also fingerprint the result, own chunks taken out of it again


@dataclass(frozen=True, slots=True)
class DropFrames:
    """Release received frames; unknown ones are ignored."""

    keys: tuple[ChunkKey, ...]


@dataclass(frozen=True, slots=True)
class EncodeParity:
    """Compute one parity chunk from received frames; ends in ParityEncoded. The frames are dropped afterwards.

    Code-word positions that are not named hold zeros.
    """

    memory: Memory
    snapshot: SnapshotId
    stripe: int
    row: int  # which parity row, 0..m-1
    parity_index: int  # where it goes, in chunks from the start of guard
    sources: tuple[tuple[int, ChunkKey], ...]  # (position, frame)


@dataclass(frozen=True, slots=True)
class VerifyChunks:
    """Read resting chunks and compare with the digests given; ends in ChunksVerified."""

    memory: Memory
    ticket: int
    first_chunk: int
    digests: tuple[int, ...]
    kind: Literal["data", "parity"] = "data"


@dataclass(frozen=True, slots=True)
class ScrubChunks:
    """Read resting chunks again, in the background, and compare with their digests; ends in ChunksScrubbed."""

    memory: Memory
    snapshot: SnapshotId
    ticket: int
    chunks: tuple[tuple[Resting, int], ...]  # (chunk, digest that it must have)
    fingerprints: bool  # whether the fingerprints are wanted, too


@dataclass(frozen=True, slots=True)
class RepairChunk:
    """Compute one resting chunk from received frames, then dropped; ends in ChunkRepaired or ChunkNotRepaired.

    Computed aside, and written only if it is right: every data chunk that the stripe lacks must have its digest, and
    the chunk itself must have `digest`, where one is given. What is right already is left as it is.
    """

    memory: Memory
    snapshot: SnapshotId
    stripe: int
    sources: tuple[tuple[int, ChunkKey], ...]  # (position, frame)
    zero_positions: tuple[int, ...]
    missing: tuple[tuple[int, int], ...]  # (data position, digest that it must have)
    wanted_position: int
    kind: Literal["data", "parity"]
    chunk: int
    digest: int | None
    number: int  # by which its end is told: until then the memory may be written


@dataclass(frozen=True, slots=True)
class DrillStripe:
    """Rebuild one stripe as if members were lost, aside, and compare; ends in StripeDrilled. The frames are dropped."""

    memory: Memory
    snapshot: SnapshotId
    stripe: int
    sources: tuple[tuple[int, ChunkKey], ...]  # (position, frame)
    own: tuple[int, Resting, int]  # (position, chunk in memory, its digest)
    zero_positions: tuple[int, ...]
    digests: tuple[tuple[int, int], ...]  # (data position, digest)
    patterns: tuple[tuple[int, ...], ...]  # positions that count as lost; those without a source are in all of them
    columns: tuple[int, ...]  # byte offsets in a chunk that the witness rebuilds


@dataclass(frozen=True, slots=True)
class WriteLedger:
    """Replace the ledger; done before the next action."""

    record: LedgerRecord


@dataclass(frozen=True, slots=True)
class WriteRecord:
    """Replace the file of a recovery record; failing to is only logged."""

    name: str
    record: RecoveryRecord


@dataclass(frozen=True, slots=True)
class CopyDurably:
    """Have the newest committed snapshot of a job copied into a directory; ends in DurablyCopied or CopyFailed."""

    job: str
    directory: str
    keep: int  # copies of the job that stay


@dataclass(frozen=True, slots=True)
class Log:
    """Say something to the operator."""

    level: Literal["info", "warning", "error"]
    text: str


Action = (
    DialPeer
    | SendPeer
    | ReplyClient
    | GiveMemory
    | DropClient
    | Allocate
    | Free
    | DigestChunks
    | StoreDigests
    | SendChunk
    | ServeChunk
    | AddToSum
    | StoreSum
    | DropFrames
    | EncodeParity
    | VerifyChunks
    | ScrubChunks
    | RepairChunk
    | DrillStripe
    | WriteLedger
    | WriteRecord
    | CopyDurably
    | Log
)
