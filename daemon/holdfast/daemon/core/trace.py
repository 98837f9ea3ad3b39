"""The flight recorder of one node: when its last snapshots and recoveries went through which stage.

Looks at events and actions as they pass; decides nothing. Holds a bounded number of spans, the newest; what happens a
thousand times in a stage (chunks) makes that stage's span longer and its count higher. A look at most of what passes is
one in a dict, a tenth of a microsecond; at what belongs to a stage less than one (`bench/flight_recorder.py`, on two
cores of an AMD EPYC), whether anybody ever asks or not.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from holdfast.daemon.core import actions, events
from holdfast.daemon.core.ledger import LedgerRecord
from holdfast.protocol import limits, messages
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.settings import SLOTS_MAX
from holdfast.protocol.trace import NodeTrace, Span

NODE = -1  # in the place of a rank
_WAY = ("staging", "sealed", "protected", "committed")  # phases of a slot, in order


@dataclass(slots=True, eq=False)
class _Open:
    """A span that may still grow."""

    key: tuple[str, str, SnapshotId | None, int]
    start_ns: int
    end_ns: int
    count: int
    note: str = ""


@dataclass(slots=True)
class Trace:
    """What one node remembers."""

    since_ns: int
    now_ns: int = 0
    kept: deque[_Open] = field(default_factory=deque)
    by_key: dict[tuple[str, str, SnapshotId | None, int], _Open] = field(default_factory=dict)
    forgotten_count: int = 0
    ranks: dict[int, int] = field(default_factory=dict)  # client -> its rank
    asking: dict[tuple[str, int], _Open] = field(default_factory=dict)  # (job, client or request) -> decision to come
    slots: dict[tuple[str, int], tuple[SnapshotId | None, str]] = field(default_factory=dict)  # as last written

    # --- what passes ---

    def saw(self, event: events.Event, now_ns: int) -> None:
        """An event came in."""
        self.now_ns = now_ns
        look = _SEEN.get(type(event))
        if look is not None:
            look(self, event)

    def did(self, action: actions.Action) -> None:
        """The core decided on an action, for the event seen last."""
        look = _DONE.get(type(action))
        if look is not None:
            look(self, action)

    # --- what is asked ---

    def told(self, newest: int) -> NodeTrace:
        """The spans of the newest so many snapshots, recoveries included."""
        wanted: set[tuple[str, SnapshotId | None]] = set()
        found: list[Span] = []
        for span in reversed(self.kept):
            stage, job, snapshot, rank = span.key
            if (job, snapshot) not in wanted:
                if len(wanted) == newest:
                    break
                wanted.add((job, snapshot))
            found.append(Span(stage, job, snapshot, rank, span.start_ns, span.end_ns, span.count, span.note))
        return NodeTrace(self.now_ns, self.since_ns, tuple(reversed(found)), self.forgotten_count)

    # --- spans ---

    def start(self, stage: str, job: str, snapshot: SnapshotId | None, rank: int = NODE) -> _Open:
        """A stage begins, anew if it was there before."""
        key = (stage, job, snapshot, rank)
        span = self.by_key[key] = _Open(key, self.now_ns, self.now_ns, 0)
        self.kept.append(span)
        if len(self.kept) > limits.TRACE_SPANS_KEPT:
            oldest = self.kept.popleft()
            self.forgotten_count += 1
            if self.by_key.get(oldest.key) is oldest:
                del self.by_key[oldest.key]
        return span

    def extend(  # its arguments are a key and two plain values
        self, stage: str, job: str, snapshot: SnapshotId | None, rank: int = NODE, *, count: int = 1, note: str = ""
    ) -> None:
        """Something of a stage happened; it begins with the first, and anew after a long pause."""
        span = self.by_key.get((stage, job, snapshot, rank))
        if span is None or self.now_ns > span.end_ns + _PAUSE_NS:
            span = self.start(stage, job, snapshot, rank)
        span.end_ns = self.now_ns
        span.count += count
        if note:
            span.note = note[: limits.TRACE_NOTE_CHARS_MAX]

    def end(self, stage: str, job: str, snapshot: SnapshotId | None, rank: int = NODE, *, note: str = "") -> None:
        """A stage that was started ends now, however long it took; nothing if it never was."""
        span = self.by_key.get((stage, job, snapshot, rank))
        if span is not None:
            span.end_ns, span.count, span.note = self.now_ns, span.count + 1, note[: limits.TRACE_NOTE_CHARS_MAX]

    # --- ranks ---

    def client_said(self, event: events.ClientSaid) -> None:
        """A rank said something."""
        client, message = event.client, event.message
        match message:
            case messages.Begin(job, snapshot, role):
                self.ranks[client] = role
                self.start("begin", job, snapshot, role)
            case messages.Seal(job, snapshot, role):
                self.end("stage", job, snapshot, role)
                self.extend("seal", job, snapshot)
            case messages.Skip(job, snapshot, role, reason):
                granted = ("stage", job, snapshot, role) in self.by_key
                self.end("stage" if granted else "begin", job, snapshot, role, note=f"skipped: {reason}")
            case messages.AskRestore(job):
                self.asking[job, client] = self.start("decide", job, None)
            case messages.OpenShard(job, _, snapshot, role):
                self.ranks[client] = role
                self.start("verify", job, snapshot, role)
            case messages.CloseShard(job, snapshot, role):
                self.end("restore", job, snapshot, role)
            case _:
                pass

    def replied(self, action: actions.ReplyClient) -> None:
        """A rank is answered."""
        rank, message = self.ranks.get(action.client, NODE), action.message
        match message:
            case messages.Granted(job, snapshot):
                self.end("begin", job, snapshot, rank)
                self.start("stage", job, snapshot, rank)
            case messages.Denied(_, job, _, text, _, snapshot) if snapshot is not None:
                self.end("begin", job, snapshot, rank, note=f"refused: {text}")
            case messages.RestoreAnswer(job, _, snapshot, _, problem):
                self._decided((job, action.client), snapshot, problem)
            case messages.ShardOpened(job, snapshot, role):
                self.end("verify", job, snapshot, role)
                self.start("restore", job, snapshot, role)
            case _:
                pass

    def client_gone(self, event: events.ClientGone) -> None:
        """A connection ended."""
        self.ranks.pop(event.client, None)
        self.asking = {key: span for key, span in self.asking.items() if key[1] != event.client}

    def _decided(self, asked: tuple[str, int], snapshot: SnapshotId | None, problem: str) -> None:
        span = self.asking.pop(asked, None)
        if span is not None:
            if self.by_key.get(span.key) is span:
                del self.by_key[span.key]
            stage, job, _, rank = span.key
            span.key = (stage, job, snapshot, rank)  # found by nobody any more: it has ended
            span.end_ns, span.count, span.note = self.now_ns, 1, problem[: limits.TRACE_NOTE_CHARS_MAX]

    # --- peers ---

    def peer_said(self, event: events.PeerSaid) -> None:
        """Another node said something."""
        match event.message:
            case messages.ChunkReply(job, snapshot):
                self.extend("send", job, snapshot, count=0)
            case messages.DigestsAnnounced(job, snapshot):
                self.extend("digests", job, snapshot)
            case messages.NodeProtected(job, snapshot):
                self.extend("facts", job, snapshot)
            case messages.RestoreAsked(job, request):
                if len(self.asking) >= limits.CLIENT_COUNT_MAX:
                    del self.asking[next(iter(self.asking))]
                self.asking[job, request] = self.start("decide", job, None)
            case _:
                pass

    def told_peer(self, action: actions.SendPeer) -> None:
        """Another node is told something."""
        match action.message:
            case messages.RestoreDecided(job, request, _, snapshot, _, problem):
                self._decided((job, request), snapshot, problem)
            case messages.WantDigests(job, snapshot):
                self.extend("digests", job, snapshot, count=0)
            case _:
                pass

    def chunk_arrived(self, event: events.ChunkArrived) -> None:
        """A chunk came in."""
        if not event.header.reading:
            self.extend("receive", event.header.job, event.header.snapshot)

    # --- the ledger: what this node has stated, holds and gave up ---

    def wrote(self, action: actions.WriteLedger) -> None:
        """The ledger changed: phases of slots are in it."""
        record: LedgerRecord = action.record
        for job in record.jobs:
            for index, slot in enumerate(job.slots):
                place, now = (job.name, index), (slot.snapshot, str(slot.phase))
                before, self.slots[place] = self.slots.get(place), now
                if before is not None and before != now:
                    self._moved(job.name, before, now)
        if len(self.slots) > limits.JOB_COUNT_MAX * SLOTS_MAX:
            self.slots.clear()  # jobs came and went: what there is will be learned with the next record

    def _moved(self, job: str, before: tuple[SnapshotId | None, str], now: tuple[SnapshotId | None, str]) -> None:
        (was, old), (snapshot, phase) = before, now
        if was is not None and was != snapshot and old in {"staging", "sealed"}:
            self.extend("given up", job, was)
        if phase == "rebuilding":
            self.start("rebuild", job, snapshot)
        elif phase == "committed" and old == "rebuilding" and was == snapshot:
            self.end("rebuild", job, snapshot)
        elif phase in _WAY:
            begun = _WAY.index(old) if was == snapshot and old in _WAY else -1
            for passed in _WAY[begun + 1 : _WAY.index(phase) + 1]:
                self._passed(passed, job, snapshot)

    def _passed(self, phase: str, job: str, snapshot: SnapshotId | None) -> None:
        if phase == "sealed":
            self.start("protect", job, snapshot)
        elif phase == "protected":
            self.end("protect", job, snapshot)
            self.extend("facts", job, snapshot)
            self.start("commit", job, snapshot)
        elif phase == "committed":
            self.end("commit", job, snapshot)


_PAUSE_NS = int(limits.TRACE_PAUSE_S * 1e9)


def _of_memory(stage: str) -> Callable[[Trace, Any], None]:
    return lambda trace, what: trace.extend(stage, what.memory.job, what.snapshot, count=0)


# Looked up by the type alone: most of what passes is of no interest, and must cost next to nothing.
_SEEN: dict[type, Callable[[Trace, Any], None]] = {
    events.ClientSaid: Trace.client_said,
    events.ClientGone: Trace.client_gone,
    events.PeerSaid: Trace.peer_said,
    events.ChunkArrived: Trace.chunk_arrived,
    events.ChunksDigested: lambda trace, event: trace.extend(
        "digest", event.memory.job, event.snapshot, count=len(event.digests)
    ),
    events.ParityEncoded: lambda trace, event: trace.extend("encode", event.memory.job, event.snapshot),
}
_DONE: dict[type, Callable[[Trace, Any], None]] = {
    actions.ReplyClient: Trace.replied,
    actions.SendPeer: Trace.told_peer,
    actions.WriteLedger: Trace.wrote,
    actions.DigestChunks: _of_memory("digest"),
    actions.EncodeParity: _of_memory("encode"),
    actions.SendChunk: lambda trace, action: trace.extend("send", action.header.job, action.header.snapshot),
    actions.AddToSum: lambda trace, action: trace.extend("sums", action.header.job, action.header.snapshot),
}
