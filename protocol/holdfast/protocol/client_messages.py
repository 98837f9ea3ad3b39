"""The conversation of a daemon with the trainers and commands of its host, as typed records.

Covers what may be said over ZeroMQ (`ClientMessage`, `DaemonMessage`) and on the Unix socket (`DoorMessage`).
`messages` shows all of it beside the conversation of the daemons; import from there.
"""

from typing import Annotated

from holdfast.protocol import limits
from holdfast.protocol.cadence import CadenceAnnounced
from holdfast.protocol.fields import Count, JobName, Message, NodeNumber, RoleNumber, Text
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.layout import Layout
from holdfast.protocol.trace import AskTrace, TraceAnswer
from msgspec import Meta

ShardDigests = Annotated[bytes, Meta(max_length=limits.SHARD_DIGESTS_COUNT_MAX * 8)]

# --- trainers and commands to their daemon ---------------------------------------------------------------------------


class AskRestore(Message, frozen=True):
    """Role 0 asks which snapshot the job should restore. Begins a new attempt."""

    job: JobName
    begin_fresh: bool = False  # the trainer doesn't want to restore: only begin the attempt
    after: Count = 0  # the attempt gets a number above this one: another epoch has begun so many
    passing_over: bool = False  # what can't be recovered is no obstacle: another epoch holds something that can


class Plan(Message, frozen=True):
    """A rank's place in the agreed layout. Memory is allocated for the node's part of it."""

    job: JobName
    attempt: Count
    role: RoleNumber
    layout: Layout  # its nodes are counted as in the list of `epoch`
    epoch: Count = 0  # in which the attempt began; 0: of a version that does not tell, so the daemon's own


class OpenShard(Message, frozen=True):
    """A rank wants to read its shard of a committed snapshot."""

    job: JobName
    attempt: Count
    snapshot: SnapshotId
    role: RoleNumber
    verify: bool = True  # the daemon reads it first and compares digests; else the rank does as it copies
    epoch: Count = 0  # in which it was staged; 0: the daemon's own


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
    stall_ns: Count | None = None  # how long its training was held up since its last Begin; None: it doesn't tell
    held_ns: Count = 0  # how long ago it would have begun, had the bytes of the one before not been on their way


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
    stall_ns: Count | None = None  # since its last Begin


class AskCommitted(Message, frozen=True):
    """Which committed snapshot can be read? Any client of any node may ask; no attempt begins."""

    job: JobName


class ReadRange(Message, frozen=True):
    """Please lend me these bytes of a role's shard of a committed snapshot, wherever they are held.

    Ends in RangeReady or RangeDenied. `request` is the client's own number for it.
    """

    job: JobName
    snapshot: SnapshotId
    role: RoleNumber
    offset_bytes: Count  # from the start of the shard
    length_bytes: Annotated[int, Meta(ge=1, le=limits.READ_RANGE_BYTES_MAX)]
    request: Count


class CloseRange(Message, frozen=True):
    """The client has copied what it read, or wants it no more."""

    request: Count


class AskStatus(Message, frozen=True):
    """A command asks for the cluster's status."""


class AskRecover(Message, frozen=True):
    """A command asks that lost nodes be rebuilt: one by name, or None for all that lost something."""

    node: Text | None = None


class AskDrill(Message, frozen=True):
    """A command asks that all nodes drill now; the outcome shows in the status."""

    stripes: Annotated[int, Meta(ge=1, le=limits.DRILL_STRIPES_MAX)]


class AskForget(Message, frozen=True):
    """A command asks to free everything that a job holds."""

    job: JobName


ClientMessage = (
    AskRestore
    | Plan
    | OpenShard
    | CloseShard
    | Begin
    | Seal
    | Skip
    | Leave
    | AskCommitted
    | ReadRange
    | CloseRange
    | AskStatus
    | AskRecover
    | AskForget
    | AskDrill
    | AskTrace
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
    earlier_epoch: Count = 0  # that this daemon serves as well, while the cluster grows or shrinks; 0: none
    earlier_node: NodeNumber = 0  # its place in that epoch's list

    def place_in(self, epoch: int) -> int | None:
        """This daemon's index in the list of an epoch, None if it does not serve that one."""
        if epoch in {0, self.epoch}:
            return self.node
        return self.earlier_node if epoch == self.earlier_epoch else None


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
    warning: Text = ""  # the step can be restored, and something about that should be looked at
    durable_dir: Text = ""  # where durable copies are, if the cluster makes any
    use_older: bool = False  # so many lives have begun from this step that a durable copy before it comes first
    epoch: Count = 0  # in which the attempt begins and plans are made; 0: the daemon's own
    held_epoch: Count = 0  # in which the snapshot was staged, whose list its layout counts; 0: the same
    held_attempt: Count = 0  # that began in that epoch, for those who open shards there
    complete: bool = True  # every node of the epoch has been heard: snapshots can commit in it
    earlier_at: NodeNumber | None = None  # a node that still serves the epoch before for this job


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
    """Read the shard from this slot until CloseShard. Its chunks passed their digests, or these are here to compare."""

    job: JobName
    snapshot: SnapshotId
    role: RoleNumber
    slot: Count
    generation: Count
    offset_bytes: Count
    shard_bytes: Count
    chunk_bytes: Count = 0
    first_chunk: Count = 0  # of the node's image; the shard may begin within it
    digests: ShardDigests = b""  # of all chunks that the shard touches, packed as in DigestsAnnounced; none: verified

    def __post_init__(self) -> None:
        if len(self.digests) % 8:
            raise ValueError(f"digests take 8 bytes each, found {len(self.digests)} bytes")

    @property
    def bytes_read(self) -> tuple[int, int]:
        """From where to where the rank reads the image: its shard, or all chunks under it to compare their digests."""
        if not self.digests:
            return self.offset_bytes, self.offset_bytes + self.shard_bytes
        start = self.first_chunk * self.chunk_bytes
        return start, start + len(self.digests) // 8 * self.chunk_bytes


class ShardPending(Message, frozen=True):
    """The shard is being rebuilt; ShardOpened or Denied follows."""

    job: JobName
    snapshot: SnapshotId
    role: RoleNumber
    text: Text


class CommittedAnswer(Message, frozen=True):
    """What AskCommitted asked. `problem`: something is committed, and it can't be read."""

    job: JobName
    attempt: Count
    snapshot: SnapshotId | None
    layout: Layout | None
    problem: Text = ""


class RangeReady(Message, frozen=True):
    """The bytes are at `offset_bytes` of this memory until CloseRange; every chunk of them passed its digest.

    The memory travels as MemoryGiven under the same (job, slot, generation); it is no slot of a snapshot.
    """

    request: Count
    job: JobName
    slot: Count
    generation: Count
    offset_bytes: Count
    length_bytes: Count


class RangeDenied(Message, frozen=True):
    """The bytes can't be read. `superseded_by`: the snapshot was released, this newer one is committed."""

    request: Count
    exit_code: Annotated[int, Meta(ge=0, le=255)]
    text: Text
    retry: bool = False
    superseded_by: SnapshotId | None = None


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


class DrillAnswer(Message, frozen=True):
    """What was started; the status shows what came of it."""

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
    | CommittedAnswer
    | RangeReady
    | RangeDenied
    | Progress
    | CadenceAnnounced
    | Denied
    | StatusAnswer
    | RecoverAnswer
    | ForgetAnswer
    | DrillAnswer
    | TraceAnswer
)
DoorMessage = Welcome | MemoryGiven
