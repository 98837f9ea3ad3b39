"""What a node remembers of its last snapshots and recoveries, stage by stage, and how that is asked for.

Times are those of the clock of the node that remembers. Who asks for several nodes lays them over one another by what
each answer tells of that clock.
"""

from typing import Annotated

from holdfast.protocol import limits
from holdfast.protocol.fields import Count, JobName, Message, NodeNumber, Text
from holdfast.protocol.ids import SnapshotId
from msgspec import Meta, Struct

# stage -> what its beginning and end are. In the order in which a snapshot, or a recovery, goes through them.
STAGES: dict[str, str] = {
    "begin": "a rank asks for a slot, until it is granted",
    "stage": "a rank copies its shard into the slot, until it seals it",
    "seal": "the node's first rank has sealed, until its last one has",
    "digest": "the node's chunks are digested",
    "digests": "digests of the group's other members arrive, or are asked for",
    "send": "the node's chunks go to their parity holders, until the last acknowledgement",
    "receive": "chunks of others arrive, for parity that this node holds",
    "encode": "parity is computed from them",
    "protect": "the node's image is sealed, until it states its fact",
    "facts": "the facts of nodes that this node hears, its own included",
    "commit": "the node has stated its fact, until it knows the snapshot to be committed",
    "given up": "the snapshot was given up on this node",
    "decide": "a rank asks what to restore, until it is answered; on the collector: until it has decided",
    "rebuild": "what the node lost of the snapshot is brought back",
    "sums": "the node's part in the rebuild, or reading, of what others lost",
    "verify": "a rank asks for its shard, until it may read it: verified, and rebuilt if need be",
    "restore": "the rank copies its shard out of the slot",
}


class Span(Struct, frozen=True, array_like=True):
    """One stage of one snapshot on one node, or on one of its ranks."""

    stage: Annotated[str, Meta(max_length=16)]  # one of STAGES; a later version may have more
    job: JobName
    snapshot: SnapshotId | None  # None: not decided yet
    rank: Annotated[int, Meta(ge=-1, lt=limits.WORLD_SIZE_MAX)]  # -1: the node's own
    start_ns: Count
    end_ns: Count
    count: Count = 1  # what happened within: chunks, messages, ranks
    note: Annotated[str, Meta(max_length=limits.TRACE_NOTE_CHARS_MAX)] = ""  # how it ended, if not well


class NodeTrace(Struct, frozen=True):
    """What a node remembers, the oldest first."""

    now_ns: Count  # its clock as it answered
    since_ns: Count  # it remembers nothing from before: its worker began then
    spans: Annotated[tuple[Span, ...], Meta(max_length=limits.TRACE_SPANS_KEPT)]
    forgotten_count: Count = 0  # spans that gave way to newer ones


class AskTrace(Message, frozen=True):
    """A command asks what a node remembers of its newest snapshots; of none: only for its clock."""

    request: Count  # the command's own number for it
    node: NodeNumber
    newest: Count


class TraceAnswer(Message, frozen=True):
    """What AskTrace asked; when the node was asked, and when its answer came, by the answering daemon's clock."""

    request: Count
    node: NodeNumber
    trace: NodeTrace | None
    asked_ns: Count
    heard_ns: Count
    problem: Text = ""


class TraceWanted(Message, frozen=True):
    """What does `node` remember? Sent to that node, or to the collector, which passes it on."""

    request: Count
    node: NodeNumber
    newest: Count


class TraceGiven(Message, frozen=True):
    """The answer to TraceWanted, on the way back. `problem`: why there is none."""

    request: Count
    node: NodeNumber
    trace: NodeTrace | None
    problem: Text = ""
