"""Every message that two processes exchange, as typed records.

Covers what may be said. How a record becomes a frame, and which frames are refused, is in `frames`; who says what when
is in the daemon's core and the client's session.

Three conversations: between daemons (`PeerMessage`), between a daemon and the trainers and commands of its host
(`ClientMessage` and `DaemonMessage`), and the header of a chunk on the bulk plane (`ChunkHeader`), which goes one way.
Messages say facts and are safe to repeat; nothing depends on a message arriving exactly once.
"""

from typing import Annotated, Literal

from holdfast.protocol import limits
from holdfast.protocol.fields import Count, JobName, Message, NodeNumber, PackedDigests, RoleNumber, Text
from holdfast.protocol.health import ChunkSuspected, FingerprintsGiven, HealthReport, WantFingerprints
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.layout import Layout
from msgspec import Meta, Struct

# --- between daemons -------------------------------------------------------------------------------------------------


class JobReport(Struct, frozen=True):
    """What a node knows and holds of one job; part of every heartbeat."""

    job: JobName
    attempt: Count
    layout_id: int | None  # of the newest plan; None before the first
    layout_version: Count
    committed: SnapshotId | None  # the newest snapshot this node knows to be committed
    committed_layout_id: int | None
    held: tuple[SnapshotId, ...]  # complete on this node: fact stated, or committed, or rebuilt
    open: tuple[SnapshotId, ...]  # a slot is open here: chunks of these are welcome
    staged: SnapshotId | None = None  # sealed on this node and newest
    given_up: Annotated[
        tuple[SnapshotId, ...], Meta(max_length=limits.GIVEN_UP_KEPT)
    ] = ()  # this node never states their fact
    lost_bytes: Count = 0  # bytes of the committed snapshot that this node should hold and doesn't
    rebuilt_bytes: Count = 0  # how many of those a running rebuild has brought back
    rebuild_state: Literal["", "running", "done", "failed"] = ""
    roles: tuple[RoleNumber, ...] = ()  # roles attached here now
    closed: bool = False
    paused: bool = False  # commits nothing until it hears what the job restores: this report stays true
    protect_s: float = 0.0  # seal to commit of the newest committed snapshot
    digest_failures: Count = 0
    health: HealthReport = HealthReport()


class Heartbeat(Message, frozen=True):
    """I live; this is what I hold. Sent every HEARTBEAT_S and whenever something in it changed."""

    config_digest: Text
    bulk_port: Annotated[int, Meta(ge=0, le=65535)]
    worker_session: Count  # raised by each restart of the worker: what was in flight before is gone
    arena_bytes: Count
    budget_bytes: Count
    jobs: Annotated[tuple[JobReport, ...], Meta(max_length=limits.JOB_COUNT_MAX)]
    engine: Text = ""


class WantLayout(Message, frozen=True):
    """You reported a layout that I don't know; please send it."""

    job: JobName
    layout_id: int


class LayoutAnnounced(Message, frozen=True):
    """A layout of the job. `current`: it is the newest plan of `attempt`; else that of an older snapshot still held."""

    job: JobName
    attempt: Count
    layout: Layout
    current: bool


class WantDigests(Message, frozen=True):
    """I rebuild or protect this snapshot; please send all data digests of our group that you know."""

    job: JobName
    snapshot: SnapshotId


class DigestsAnnounced(Message, frozen=True):
    """Digests of consecutive data chunks of `node`'s image (unsigned 64 bit, little-endian, packed)."""

    job: JobName
    snapshot: SnapshotId
    node: NodeNumber
    first_chunk: Count
    digests: PackedDigests

    def __post_init__(self) -> None:
        if len(self.digests) % 8:
            raise ValueError(f"digests take 8 bytes each, found {len(self.digests)} bytes")


class SnapshotOpened(Message, frozen=True):
    """I have room for your chunks of this snapshot."""

    job: JobName
    snapshot: SnapshotId


class NodeProtected(Message, frozen=True):
    """The fact: my image is sealed and all parity that I hold of this snapshot is complete. Never untrue again."""

    job: JobName
    snapshot: SnapshotId
    node: NodeNumber


class NodeGaveUp(Message, frozen=True):
    """The counter-fact: I have not stated, and will never state, NodeProtected for this snapshot. It can't commit."""

    job: JobName
    snapshot: SnapshotId
    node: NodeNumber
    reason: Text


class SnapshotCommitted(Message, frozen=True):
    """All facts were seen: this snapshot is committed."""

    job: JobName
    snapshot: SnapshotId


class RestoreAsked(Message, frozen=True):
    """To the collector: which snapshot should the job restore?"""

    job: JobName
    request: Count


class ReportWanted(Message, frozen=True):
    """From the collector: answer with a heartbeat at once, and commit nothing of `job` until it has decided.

    What the answer says must still be true when the decision arrives: a commit in between would free what was chosen.
    """

    request: Count
    job: JobName | None = None


class RestoreDecided(Message, frozen=True):
    """The collector's answer; it also begins the new attempt on whoever hears it."""

    job: JobName
    request: Count
    attempt: Count
    snapshot: SnapshotId | None
    layout: Layout | None  # of the snapshot, or None if nothing is committed
    problem: Text = ""  # not empty: something is committed, and it can't be recovered


class ReadChunk(Message, frozen=True):
    """Please send me one chunk that you hold of a complete snapshot."""

    job: JobName
    snapshot: SnapshotId
    kind: Literal["data", "parity"]
    chunk: Count


class ChunkUnavailable(Message, frozen=True):
    """I can't send that chunk: I don't hold it, or it fails its digest."""

    job: JobName
    snapshot: SnapshotId
    kind: Literal["data", "parity"]
    chunk: Count
    reason: Text


class ChunkReply(Message, frozen=True):
    """Acknowledges a contribution once it is in the parity (`ok`), or says that it has to be sent again."""

    job: JobName
    snapshot: SnapshotId
    chunk: Count
    ok: bool


class RebuildAsked(Message, frozen=True):
    """An operator asks `node` to rebuild what it lost."""

    node: NodeNumber


class StatusWanted(Message, frozen=True):
    """To the collector, which hears every node: the cluster's status, please."""

    request: Count


class StatusGiven(Message, frozen=True):
    """The collector's answer; a tree of plain values."""

    request: Count
    status: dict[str, object]


class JobForgotten(Message, frozen=True):
    """Free everything of this job, up to and including `attempt`."""

    job: JobName
    attempt: Count


class Refused(Message, frozen=True):
    """Your frame was refused. Sent back on the connection on which it came."""

    code: Literal[
        "malformed",
        "oversized",
        "unknown",
        "version",
        "cluster",
        "epoch",
        "config",
        "node",
        "superseded",
        "key",
    ]
    text: Text
    incarnation: Count = 0  # with "superseded": the incarnation that holds the slot


PeerMessage = (
    Heartbeat
    | WantLayout
    | LayoutAnnounced
    | WantDigests
    | DigestsAnnounced
    | SnapshotOpened
    | NodeProtected
    | NodeGaveUp
    | SnapshotCommitted
    | RestoreAsked
    | ReportWanted
    | RestoreDecided
    | ReadChunk
    | ChunkUnavailable
    | ChunkReply
    | WantFingerprints
    | FingerprintsGiven
    | ChunkSuspected
    | RebuildAsked
    | StatusWanted
    | StatusGiven
    | JobForgotten
    | Refused
)


# --- chunks on the bulk plane ----------------------------------------------------------------------------------------


class ChunkHeader(Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """Stands before one raw frame of chunk_bytes bytes."""

    cluster: Text
    epoch: Count
    sender: NodeNumber
    incarnation: Count
    job: JobName
    snapshot: SnapshotId
    node: NodeNumber  # whose image the chunk belongs to (data), or who holds it (parity)
    kind: Literal["data", "parity"]
    chunk: Count
    reading: bool  # the answer to ReadChunk; False: a contribution to parity


# --- trainers and commands to their daemon ---------------------------------------------------------------------------


class AskRestore(Message, frozen=True):
    """Role 0 asks which snapshot the job should restore. Begins a new attempt."""

    job: JobName
    begin_fresh: bool = False  # the trainer doesn't want to restore: only begin the attempt


class Plan(Message, frozen=True):
    """A rank's place in the agreed layout. Memory is allocated for the node's part of it."""

    job: JobName
    attempt: Count
    role: RoleNumber
    layout: Layout


class OpenShard(Message, frozen=True):
    """A rank wants to read its shard of a committed snapshot."""

    job: JobName
    attempt: Count
    snapshot: SnapshotId
    role: RoleNumber


class CloseShard(Message, frozen=True):
    """The rank has copied its shard out of the arena."""

    job: JobName
    snapshot: SnapshotId
    role: RoleNumber


class Begin(Message, frozen=True):
    """A rank wants to stage a step."""

    job: JobName
    snapshot: SnapshotId
    role: RoleNumber


class Seal(Message, frozen=True):
    """The rank's shard is whole in its slot."""

    job: JobName
    snapshot: SnapshotId
    role: RoleNumber


class Skip(Message, frozen=True):
    """The rank skips or tore this snapshot; `reason` says why. The snapshot can't commit."""

    job: JobName
    snapshot: SnapshotId
    role: RoleNumber
    reason: Text


class Leave(Message, frozen=True):
    """The rank is done with the job; its last snapshot stays held."""

    job: JobName
    role: RoleNumber


class AskStatus(Message, frozen=True):
    """A command asks for the cluster's status."""


class AskRecover(Message, frozen=True):
    """A command asks that lost nodes be rebuilt: one by name, or None for all that lost something."""

    node: Text | None = None


class AskForget(Message, frozen=True):
    """A command asks to free everything that a job holds."""

    job: JobName


ClientMessage = (
    AskRestore | Plan | OpenShard | CloseShard | Begin | Seal | Skip | Leave | AskStatus | AskRecover | AskForget
)


# --- a daemon to its trainers and commands ---------------------------------------------------------------------------


class Welcome(Message, frozen=True):
    """The first frame on the Unix socket: who this daemon is, and where to send messages."""

    protocol: int
    cluster: Text
    epoch: Count
    node: NodeNumber
    node_name: Text
    token: Text
    endpoint: Text


class MemoryGiven(Message, frozen=True):
    """On the Unix socket, with one descriptor beside it: the memory of slot `slot` of a job (this node's image)."""

    job: JobName
    slot: Count
    generation: Count  # a slot's memory is replaced when the layout changes; the generation tells which one this is
    data_bytes: Count


class RestoreAnswer(Message, frozen=True):
    """What role 0 asked: the attempt that begins, and the snapshot to restore."""

    job: JobName
    attempt: Count
    snapshot: SnapshotId | None
    layout: Layout | None
    problem: Text = ""


class PlanAccepted(Message, frozen=True):
    """Memory is ready; the rank's shard lies at `offset_bytes` of every slot."""

    job: JobName
    attempt: Count
    role: RoleNumber
    offset_bytes: Count
    shard_bytes: Count


class Granted(Message, frozen=True):
    """Stage into this slot."""

    job: JobName
    snapshot: SnapshotId
    slot: Count
    generation: Count


class ShardOpened(Message, frozen=True):
    """The shard's chunks passed their digests; read it from this slot until CloseShard."""

    job: JobName
    snapshot: SnapshotId
    role: RoleNumber
    slot: Count
    generation: Count
    offset_bytes: Count
    shard_bytes: Count


class ShardPending(Message, frozen=True):
    """The shard is being rebuilt; ShardOpened or Denied follows."""

    job: JobName
    snapshot: SnapshotId
    role: RoleNumber
    text: Text


class Progress(Message, frozen=True):
    """Where the job's snapshots stand on this node, told at each change."""

    job: JobName
    sealed: SnapshotId | None
    protected: SnapshotId | None
    committed: SnapshotId | None
    given_up: SnapshotId | None
    reason: Text = ""  # why the newest given-up snapshot was given up


class Denied(Message, frozen=True):
    """A request can't be met. `exit_code` is the one of the command line; `retry` says that trying again may help."""

    request: Text  # the tag of the refused message
    job: Text
    exit_code: Annotated[int, Meta(ge=0, le=255)]
    text: Text
    retry: bool = False
    snapshot: SnapshotId | None = None  # set where the request was about staging one


class StatusAnswer(Message, frozen=True):
    """The status as a tree of plain values, ready to be printed as JSON."""

    status: dict[str, object]


class RecoverAnswer(Message, frozen=True):
    """What was started: node names, and one line of text."""

    started: tuple[Text, ...]
    text: Text


class ForgetAnswer(Message, frozen=True):
    """The job is being freed everywhere."""

    job: JobName
    found: bool


DaemonMessage = (
    RestoreAnswer
    | PlanAccepted
    | Granted
    | ShardOpened
    | ShardPending
    | Progress
    | Denied
    | StatusAnswer
    | RecoverAnswer
    | ForgetAnswer
)
DoorMessage = Welcome | MemoryGiven
