"""What can happen to a daemon. Facts in the past; the shell makes them, `Node.handle` takes them.

Time comes beside every event as `now_ns`, the shell's monotonic clock. Each action that can end in several ways has
one event per ending.
"""

from dataclasses import dataclass

from holdfast.daemon.core.health import Resting
from holdfast.daemon.core.memory import Memory
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.messages import ChunkHeader, ClientMessage, PeerMessage


@dataclass(frozen=True, slots=True)
class TimePassed:
    """The clock moved. `free_bytes` is what the machine could still give (MemAvailable)."""

    free_bytes: int


@dataclass(frozen=True, slots=True)
class PeerSaid:
    """A checked frame from another daemon: right cluster, right epoch, the key of the node it claims to be."""

    node: int
    incarnation: int
    message: PeerMessage


@dataclass(frozen=True, slots=True)
class PeerRefused:
    """Something that claims to be a peer was refused, or a peer refused us."""

    node: int | None
    code: str
    text: str
    by_us: bool
    incarnation: int = 0


@dataclass(frozen=True, slots=True)
class ClientArrived:
    """A trainer or command of this host opened the Unix socket; `client` numbers the connection."""

    client: int
    pid: int


@dataclass(frozen=True, slots=True)
class ClientGone:
    """The connection ended: the process closed it or died; all its threads are gone."""

    client: int


@dataclass(frozen=True, slots=True)
class ClientSaid:
    """A message of an arrived client."""

    client: int
    message: ClientMessage


@dataclass(frozen=True, slots=True)
class MemoryReady:
    """Memory was made, populated and sealed."""

    memory: Memory


@dataclass(frozen=True, slots=True)
class MemoryFailed:
    """The kernel gave no memory."""

    memory: Memory
    reason: str


@dataclass(frozen=True, slots=True)
class ChunksDigested:
    """Digests of consecutive data chunks of the own image, as it was when `snapshot` lay in it."""

    memory: Memory
    snapshot: SnapshotId
    first_chunk: int
    digests: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ChunkArrived:
    """A chunk came on the bulk plane and its bytes were digested; the shell keeps the frame until told to drop it."""

    header: ChunkHeader
    digest: int


@dataclass(frozen=True, slots=True)
class ParityEncoded:
    """A parity chunk was computed from all contributions of its stripe."""

    memory: Memory
    snapshot: SnapshotId
    stripe: int
    digest: int


@dataclass(frozen=True, slots=True)
class ChunksVerified:
    """Resting chunks were read again and compared with their digests; `bad` lists those that differ."""

    memory: Memory
    ticket: int
    bad: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ChunksScrubbed:
    """Resting chunks were read again. `bad`: those that fail their digest."""

    memory: Memory
    snapshot: SnapshotId
    ticket: int
    bad: tuple[Resting, ...]
    fingerprints: tuple[bytes, ...] = ()  # one per chunk that was ordered, empty for a bad one; () if none were wanted


@dataclass(frozen=True, slots=True)
class ChunkRepaired:
    """A resting chunk was computed again. `good`: it is right now; `changed`: it was not, and was written."""

    memory: Memory
    snapshot: SnapshotId
    wanted: Resting
    digest: int
    good: bool
    changed: bool
    number: int


@dataclass(frozen=True, slots=True)
class ChunkNotRepaired:
    """The memory or a frame was gone; nothing is written any more."""

    memory: Memory
    number: int


@dataclass(frozen=True, slots=True)
class StripeDrilled:
    """A stripe was rebuilt as if members were lost. `wrong`: what did not come out right, for people."""

    memory: Memory
    snapshot: SnapshotId
    stripe: int
    wrong: tuple[str, ...]
    coded_ns: int
    pattern_count: int


@dataclass(frozen=True, slots=True)
class ChunkNotServed:
    """A chunk that a peer wants failed its digest here and was not sent."""

    node: int
    header: ChunkHeader


@dataclass(frozen=True, slots=True)
class SumAdded:
    """An own chunk is in a sum that was sent on; `fingerprint` is that of the chunk, times the factor asked for."""

    header: ChunkHeader
    fingerprint: bytes


@dataclass(frozen=True, slots=True)
class SumNotAdded:
    """A sum was not sent on from here."""

    header: ChunkHeader
    reason: str


@dataclass(frozen=True, slots=True)
class SumStored:
    """A wanted chunk is where it should be. Whether it is right is for the core to judge."""

    memory: Memory
    number: int
    digest: int
    fingerprint: bytes  # empty if none was wanted


@dataclass(frozen=True, slots=True)
class SumNotStored:
    """A wanted chunk could not be put together: an own chunk fails its digest, or a frame is gone."""

    memory: Memory
    number: int
    reason: str


@dataclass(frozen=True, slots=True)
class DurablyCopied:
    """A job's snapshot is whole in the durable directory."""

    job: str
    snapshot: SnapshotId
    size_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class CopyFailed:
    """A durable copy was not made; the directory shows nothing of it."""

    job: str
    reason: str


Event = (
    TimePassed
    | PeerSaid
    | PeerRefused
    | ClientArrived
    | ClientGone
    | ClientSaid
    | MemoryReady
    | MemoryFailed
    | ChunksDigested
    | ChunkArrived
    | ParityEncoded
    | ChunksVerified
    | ChunksScrubbed
    | ChunkRepaired
    | ChunkNotRepaired
    | StripeDrilled
    | ChunkNotServed
    | SumAdded
    | SumNotAdded
    | SumStored
    | SumNotStored
    | DurablyCopied
    | CopyFailed
)
