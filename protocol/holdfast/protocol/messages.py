"""Every message that two processes exchange, as typed records.

Covers what may be said. How a record becomes a frame, and which frames are refused, is in `frames`; who says what when
is in the daemon's core and the client's session.

Three conversations: between daemons (`PeerMessage`), between a daemon and the trainers and commands of its host
(`ClientMessage` and `DaemonMessage`), and the header of a chunk on the bulk plane (`ChunkHeader`), which goes one way.
Messages say facts and are safe to repeat; nothing depends on a message arriving exactly once.
"""

from typing import Annotated, Literal

from holdfast.protocol import limits
from holdfast.protocol.cadence import CadenceAnnounced, PaceReport
from holdfast.protocol.client_messages import (
    AskCommitted,
    AskDrill,
    AskForget,
    AskRecover,
    AskRestore,
    AskStatus,
    Begin,
    ClientMessage,
    CloseRange,
    CloseShard,
    CommittedAnswer,
    DaemonMessage,
    Denied,
    DoorMessage,
    DrillAnswer,
    ForgetAnswer,
    Granted,
    Leave,
    MemoryGiven,
    OpenShard,
    Plan,
    PlanAccepted,
    Progress,
    RangeDenied,
    RangeReady,
    ReadRange,
    RecoverAnswer,
    RestoreAnswer,
    Seal,
    ShardOpened,
    ShardPending,
    Skip,
    StatusAnswer,
    Welcome,
)
from holdfast.protocol.earlier import EarlierGiven, EarlierReport, EarlierWanted
from holdfast.protocol.estate_messages import EstateReport, MixesWanted, SumTerm
from holdfast.protocol.fields import Count, JobName, Message, NodeNumber, PackedDigests, RoleNumber, Seconds, Text
from holdfast.protocol.health import (
    ChunkSuspected,
    DrillAsked,
    DrillReport,
    DurableReport,
    FingerprintsGiven,
    HealthReport,
    WantFingerprints,
)
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.layout import Layout
from holdfast.protocol.trace import TraceGiven, TraceWanted
from holdfast.protocol.views import PeerView
from msgspec import UNSET, Meta, Struct, UnsetType

__all__ = [
    "AskCommitted",
    "AskDrill",
    "AskForget",
    "AskRecover",
    "AskRestore",
    "AskStatus",
    "Begin",
    "CadenceAnnounced",
    "ChunkHeader",
    "ChunkReply",
    "ChunkSuspected",
    "ChunkUnavailable",
    "ClientMessage",
    "CloseRange",
    "CloseShard",
    "CommittedAnswer",
    "CommittedGiven",
    "CommittedWanted",
    "Count",
    "DaemonMessage",
    "Denied",
    "DigestsAnnounced",
    "DoorMessage",
    "DrillAnswer",
    "DrillAsked",
    "EarlierGiven",
    "EarlierReport",
    "EarlierWanted",
    "EstateReport",
    "FingerprintsGiven",
    "ForgetAnswer",
    "Granted",
    "HealthReport",
    "Heartbeat",
    "JobForgotten",
    "JobName",
    "JobReport",
    "LayoutAnnounced",
    "Leave",
    "MemoryGiven",
    "Message",
    "MixesWanted",
    "NodeGaveUp",
    "NodeNumber",
    "NodeProtected",
    "OpenShard",
    "PackedDigests",
    "PeerMessage",
    "Plan",
    "PlanAccepted",
    "Progress",
    "RangeDenied",
    "RangeReady",
    "ReadChunk",
    "ReadRange",
    "RebuildAsked",
    "RecoverAnswer",
    "Refused",
    "ReportWanted",
    "RestoreAnswer",
    "RestoreAsked",
    "RestoreDecided",
    "RoleNumber",
    "Seal",
    "ShardOpened",
    "ShardPending",
    "Skip",
    "SnapshotCommitted",
    "SnapshotOpened",
    "StatusAnswer",
    "StatusGiven",
    "StatusWanted",
    "SumFailed",
    "SumPart",
    "SumTerm",
    "SumWitness",
    "SumsWanted",
    "Text",
    "WantDigests",
    "WantFingerprints",
    "WantLayout",
    "Welcome",
]


# --- between daemons -------------------------------------------------------------------------------------------------


Snapshots = Annotated[tuple[SnapshotId, ...], Meta(max_length=limits.SLOTS_COUNT_MAX)]  # one per slot


Pauses = Annotated[  # (collector, its number of the question)
    tuple[tuple[NodeNumber, Count], ...], Meta(max_length=limits.PAUSES_KEPT_COUNT)
]


class JobReport(Struct, frozen=True):
    """What a node knows and holds of one job; part of every heartbeat."""

    job: JobName
    attempt: Count
    layout_id: int | None  # of the newest plan; None before the first
    layout_version: Count
    committed: SnapshotId | None  # the newest snapshot this node knows to be committed
    committed_layout_id: int | None
    held: Snapshots  # complete on this node: fact stated, or committed, or rebuilt
    open: Snapshots  # a slot is open here: chunks of these are welcome
    staged: SnapshotId | None = None  # sealed on this node and newest
    given_up: Annotated[
        tuple[SnapshotId, ...], Meta(max_length=limits.GIVEN_UP_KEPT)
    ] = ()  # this node never states their fact
    lost_bytes: Count = 0  # bytes of the committed snapshot that this node should hold and doesn't
    rebuilt_bytes: Count = 0  # how many of those a running rebuild has brought back
    rebuild_state: Literal["", "running", "done", "failed"] = ""
    received_bytes: Count = 0  # what the running or last rebuild has received over the network
    rebuild_s: Seconds = 0.0  # how long it has taken so far, or took
    roles: Annotated[tuple[RoleNumber, ...], Meta(max_length=limits.WORLD_SIZE_MAX)] = ()  # roles attached here now
    closed: bool = False
    paused: bool = False  # commits nothing until it hears what the job restores: this report stays true
    paused_for: Pauses | UnsetType = UNSET  # for which questions; a decision on an earlier one ends another's pause
    protect_s: Seconds = 0.0  # seal to commit of the newest committed snapshot
    digest_failures: Count = 0
    health: HealthReport = HealthReport()
    pace: PaceReport = PaceReport()
    drill: DrillReport = DrillReport()
    durable: DurableReport = DurableReport()
    estate: EstateReport | UnsetType = UNSET  # not said where there is none


class Heartbeat(Message, frozen=True):
    """I live; this is what I hold. Sent every HEARTBEAT_S and whenever something in it changed."""

    config_digest: Text
    bulk_port: Annotated[int, Meta(ge=0, le=65535)]
    worker_session: Count  # raised by each restart of the worker: what was in flight before is gone
    arena_bytes: Count
    budget_bytes: Count
    jobs: Annotated[tuple[JobReport, ...], Meta(max_length=limits.JOB_COUNT_MAX)]
    engine: Text = ""
    recovery_record: Text = ""  # the file of the newest one, on that node
    address: Text = ""  # of its control plane, as its own config has it; empty: of a version that doesn't tell
    views: Annotated[tuple[PeerView, ...], Meta(max_length=limits.NODE_COUNT_MAX)] = ()
    earlier: EarlierReport | UnsetType = UNSET  # not said where the epoch before is over


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
    begin_fresh: bool = False  # none: only an attempt is to begin
    after: Count = 0  # as in AskRestore
    passing_over: bool = False  # likewise


class ReportWanted(Message, frozen=True):
    """From the collector: answer with a heartbeat at once, and commit nothing of `job` until it has decided.

    What the answer says must still be true when the decision arrives: a commit in between would free what was chosen.
    """

    request: Count  # of a question what to restore: the collector's own number of it
    job: JobName | None = None


class RestoreDecided(Message, frozen=True):
    """The collector's answer; it also begins the new attempt on whoever hears it."""

    job: JobName
    request: Count
    attempt: Count
    snapshot: SnapshotId | None
    layout: Layout | None  # of the snapshot, or None if nothing is committed
    problem: Text = ""  # not empty: something is committed, and it can't be recovered
    asker: NodeNumber | None = None  # on whose node the rank asked
    number: Count = 0  # the collector's own of the question
    complete: bool = True  # every node of this epoch has been heard
    earlier_at: NodeNumber | None = None  # a node that still serves the epoch before for this job


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


class SumPart(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What one node does for one sum: `factor` times a chunk that it holds, in GF(2^8), and what it gathers, sent on.

    A sum is a chunk on its way from those who hold it, or hold what it can be computed from, to the node that wants it.
    One of them gathers the chunks of the others. One part with factor 1 that gathers nothing is the chunk itself.
    """

    number: Count  # of what is sent; given by the node that wants the sum, never used twice
    kind: Literal["data", "parity"]
    chunk: Count
    factor: Annotated[int, Meta(ge=1, le=255)]
    target: NodeNumber  # where the result goes
    gathers: Annotated[tuple[SumTerm, ...], Meta(max_length=limits.SUM_TERMS_COUNT_MAX)] = ()
    witness: Annotated[int, Meta(ge=0, le=255)] = 0  # also tell who wants it the fingerprint of the chunk, times this


class SumsWanted(Message, frozen=True):
    """Please take part in these sums. Each ends in a frame to its target, or in SumFailed."""

    job: JobName
    snapshot: SnapshotId
    parts: Annotated[tuple[SumPart, ...], Meta(max_length=limits.SUMS_PER_MESSAGE_COUNT_MAX)]


class SumFailed(Message, frozen=True):
    """To the node that wants it: I can't do my part. `waits_for`: that node sent me nothing."""

    job: JobName
    number: Count
    reason: Text
    waits_for: NodeNumber | None = None


class SumWitness(Message, frozen=True):
    """To the node that wants it: the linear fingerprint of my chunk, times the factor with which it is in the sum."""

    job: JobName
    number: Count
    fingerprint: Annotated[bytes, Meta(min_length=256, max_length=256)]


class CommittedWanted(Message, frozen=True):
    """To the collector: which snapshot of the job can be read? Begins nothing."""

    job: JobName
    request: Count


class CommittedGiven(Message, frozen=True):
    """The collector's answer to CommittedWanted."""

    job: JobName
    request: Count
    attempt: Count
    snapshot: SnapshotId | None
    layout: Layout | None
    problem: Text = ""


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
        "malformed", "oversized", "unknown", "version", "cluster", "epoch", "config", "bulk", "node", "superseded",
        "key",
    ]  # fmt: skip
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
    | SumsWanted
    | MixesWanted
    | SumFailed
    | SumWitness
    | CommittedWanted
    | CommittedGiven
    | ChunkReply
    | WantFingerprints
    | FingerprintsGiven
    | ChunkSuspected
    | DrillAsked
    | RebuildAsked
    | StatusWanted
    | StatusGiven
    | JobForgotten
    | TraceWanted
    | TraceGiven
    | EarlierWanted
    | EarlierGiven
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
    node: NodeNumber  # whose image the chunk belongs to (data), who holds it (parity), or who wants it (sum)
    kind: Literal["data", "parity", "sum"]
    chunk: Count  # of a sum: its number
    reading: bool  # the answer to ReadChunk, or a sum; False: a contribution to parity
    digest: Annotated[int, Meta(ge=0)] = 0  # of a sum: of the frame, so that damage on the way shows at its next node
