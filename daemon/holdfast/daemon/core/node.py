"""One node's brain: every event enters by `Node.handle`, every decision leaves as an action.

Covers dispatch, the order of effects, and what concerns all jobs at once (heartbeats, the ledger, forgetting). The
ledger is written before anything else that an event causes, so that a stated fact is never newer than what a restarted
worker knows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import assert_never

from holdfast.daemon.core import events, report
from holdfast.daemon.core.actions import Action, DropFrames, Free, ServeChunk, WriteLedger
from holdfast.daemon.core.arena import Arena
from holdfast.daemon.core.collector import Collector
from holdfast.daemon.core.context import Context
from holdfast.daemon.core.job import Job
from holdfast.daemon.core.ledger import JobRecord, LedgerRecord, SlotRecord
from holdfast.daemon.core.memory import Memory, sizes_of
from holdfast.daemon.core.peers import Peers
from holdfast.daemon.core.protect import Protect, key_of
from holdfast.daemon.core.rebuild import Rebuild
from holdfast.daemon.core.shards import Shards
from holdfast.daemon.core.slot import COMPLETE, IN_FLIGHT, Phase, Slot
from holdfast.protocol import limits, messages
from holdfast.protocol.exit_codes import ExitCode
from holdfast.protocol.frames import pack_digests
from holdfast.protocol.ids import SnapshotId


@dataclass(slots=True)
class JobParts:
    """A job and the machines that work on it."""

    job: Job
    protect: Protect
    rebuild: Rebuild
    shards: Shards


class Node:
    """The daemon of one node, without its hands."""

    def __init__(self, ctx: Context, *, started_ns: int) -> None:
        ctx.now_ns = started_ns
        self.ctx = ctx
        self.arena = Arena(ctx.budget_bytes)
        self.peers = Peers(ctx, started_ns)
        self.collector = Collector(ctx, self.peers)
        self.jobs: dict[str, JobParts] = {}
        self.clients: set[int] = set()
        self.asking: dict[int, tuple[int, messages.AskRestore]] = {}  # request -> (client, question)
        self.unsent: list[tuple[int, messages.AskRestore]] = []  # questions that wait until a collector is known
        self.status_asked: dict[int, tuple[int, int]] = {}  # request -> (client, deadline_ns)
        self.next_request = 1
        self.heartbeat_ns = 0
        self.written: LedgerRecord | None = None

    # --- the one door ---

    def start(self) -> list[Action]:
        """The first actions of a worker's life."""
        self.peers.start()
        return self._flush()

    def handle(self, event: events.Event, now_ns: int) -> list[Action]:
        """Apply one event at time `now_ns`; return what the shell must now do, in order."""
        assert now_ns >= self.ctx.now_ns, "the clock is monotonic"
        self.ctx.now_ns = now_ns
        match event:
            case events.TimePassed():
                self._tick(event)
            case events.PeerSaid():
                self._peer_said(event)
            case events.PeerRefused():
                self._peer_refused(event)
            case events.ClientArrived(client):
                self.clients.add(client)
            case events.ClientGone(client):
                self._client_gone(client)
            case events.ClientSaid(client, message):
                if client in self.clients:
                    self._client_said(client, message)
            case _:
                self._work_done(event)
        return self._flush()

    def _flush(self) -> list[Action]:
        record = self._record()
        actions, self.ctx.actions = self.ctx.actions, []
        if record != self.written:
            self.written = record
            actions.insert(0, WriteLedger(record))
        return actions

    def check(self) -> None:
        """Assert every invariant; tests and the simulator call this after each event."""
        self.arena.check()
        for parts in self.jobs.values():
            parts.job.check()

    # --- jobs ---

    def parts(self, name: str) -> JobParts | None:
        """A job by name, created when it is new and there is room for one more."""
        if name not in self.jobs:
            if len(self.jobs) >= limits.JOB_COUNT_MAX:
                self.ctx.log(f"job {name} refused: {limits.JOB_COUNT_MAX} jobs are the limit", "error")
                return None
            slots = [Slot(index, self.ctx.node) for index in range(self.ctx.config.slots)]
            job = Job(self.ctx, self.arena, name, slots, touched_ns=self.ctx.now_ns)
            rebuild = Rebuild(job, self.peers)
            self.jobs[name] = JobParts(job, Protect(job), rebuild, Shards(job, rebuild))
        return self.jobs[name]

    def forget(self, name: str) -> bool:
        """Free all that a job holds on this node."""
        parts = self.jobs.pop(name, None)
        if parts is None:
            return False
        parts.rebuild.cancel("the job was forgotten")
        for slot in parts.job.slots:
            if slot.phase is not Phase.ABSENT:
                self.arena.release(slot.memory(name))
                self.ctx.emit(Free(slot.memory(name)))
        self.collector.facts.pop(name, None)
        self.ctx.log(f"job {name}: forgotten, its memory is free")
        return True

    def evict_closed(self) -> None:
        """Forget jobs that closed, or lost all their ranks, long ago."""
        limit_ns = self.ctx.now_ns - int(self.ctx.config.closed_job_s * 1e9)
        for name, parts in list(self.jobs.items()):
            idle = not parts.job.writers and not any(s.phase in IN_FLIGHT for s in parts.job.slots)
            if idle and parts.job.touched_ns < limit_ns:
                self.forget(name)

    # --- time ---

    def _tick(self, event: events.TimePassed) -> None:
        self.ctx.free_bytes = event.free_bytes
        for node in self.peers.silence():
            self._flight_lost(node)
        for parts in self.jobs.values():
            parts.protect.tick()
            if parts.rebuild.running and parts.rebuild.snapshot != parts.job.committed:
                parts.rebuild.cancel("a newer snapshot is committed")
            parts.rebuild.tick()
            parts.shards.tick()
            self.collector.consider(parts.job)
        self._answer_queries()
        for client, question in self.unsent[:]:
            if self.peers.settled:
                self.unsent.remove((client, question))
                self._ask_restore(client, question)
        self._expire_status()
        self.evict_closed()
        if self.ctx.now_ns >= self.heartbeat_ns:
            self._send_heartbeat()

    def _send_heartbeat(self) -> None:
        self.heartbeat_ns = self.ctx.seconds(limits.HEARTBEAT_S)
        self.ctx.tell_all(self._heartbeat())

    def _heartbeat(self) -> messages.Heartbeat:
        reports = [report.job_report(p.job, p.rebuild) for p in self.jobs.values()]
        return report.heartbeat(self.ctx, self.arena, reports)

    # --- peers ---

    def _peer_refused(self, event: events.PeerRefused) -> None:
        who = "a stranger" if event.node is None else f"node {self.ctx.name_of(event.node)}"
        text = f"we refuse {who}: {event.text}" if event.by_us else f"{who} refuses us: {event.text}"
        if event.node is not None and event.node != self.ctx.node:
            peer = self.peers.table[event.node]
            if peer.refused == text:
                return
            peer.refused = text
            if event.code == "superseded" and not event.by_us and not self.jobs and event.incarnation:
                # Nothing is held here, so this is a fresh replacement whose clock lags: take the slot over.
                self.ctx.incarnation = max(self.ctx.incarnation, event.incarnation + 1)
                text += f"; going on as incarnation {self.ctx.incarnation}"
        self.ctx.log(text, "error")

    def _peer_said(self, event: events.PeerSaid) -> None:
        message = event.message
        beat = message if isinstance(message, messages.Heartbeat) else None
        if beat is not None and beat.config_digest != self.ctx.config_digest:
            text = f"expected config digest {self.ctx.config_digest}, found {beat.config_digest}: the cluster's file differs there"
            self._refuse(event.node, "config", text)
            return
        known = self.peers.table[event.node].incarnation
        accepted, lost_flight = self.peers.heard(event.node, event.incarnation, beat)
        if not accepted:
            text = f"incarnation {event.incarnation} is superseded by {known}, which holds this node's slot"
            self._refuse(event.node, "superseded", text, incarnation=known)
            return
        if lost_flight:
            self._flight_lost(event.node)
        self._peer_message(event.node, message)

    def _refuse(self, node: int, code: str, text: str, *, incarnation: int = 0) -> None:
        self._peer_refused(events.PeerRefused(node, code, text, by_us=True))
        assert code in {"config", "superseded"}
        self.ctx.tell(
            node,
            messages.Refused("config" if code == "config" else "superseded", text, incarnation),
        )

    def _flight_lost(self, node: int) -> None:
        for parts in self.jobs.values():
            parts.protect.peer_lost_flight(node)

    def _peer_message(self, node: int, message: messages.PeerMessage) -> None:
        match message:
            case messages.Heartbeat():
                for job_report in message.jobs:
                    self._heard_report(node, job_report)
            case messages.ReportWanted():
                self.ctx.tell(node, self._heartbeat())
            case messages.RestoreAsked(job, request):
                self.collector.ask(job, request, node)
            case messages.RestoreDecided():
                self._restore_decided(message)
            case messages.RebuildAsked(target):
                self._rebuild_asked(target)
            case messages.StatusWanted(request):
                self.ctx.tell(node, messages.StatusGiven(request, self.status()))
            case messages.StatusGiven(request, status):
                asked = self.status_asked.pop(request, None)
                if asked is not None:
                    self.ctx.reply(asked[0], messages.StatusAnswer(status))
            case messages.Refused(code, text, incarnation):
                self._peer_refused(events.PeerRefused(node, code, text, by_us=False, incarnation=incarnation))
            case messages.JobForgotten(job, attempt):
                parts = self.jobs.get(job)
                if parts is not None and parts.job.attempt <= attempt and self.forget(job):
                    self.ctx.tell_all(message)  # the collector passes it on to the other groups
            case _:
                self._peer_job_message(node, message)

    def _peer_job_message(self, node: int, message: messages.PeerMessage) -> None:
        name = getattr(message, "job", "")
        parts = self.parts(name) if isinstance(message, messages.LayoutAnnounced) else self.jobs.get(name)
        if parts is None:
            return
        match message:
            case messages.WantLayout(_, layout_id):
                self._send_layout(node, parts.job, layout_id)
            case messages.LayoutAnnounced(_, attempt, layout, current):
                if current:
                    parts.job.adopt_plan(attempt, layout)
                else:
                    parts.job.learn_layout(layout)
                self.collector.consider(parts.job)
            case messages.WantDigests(_, snapshot):
                self._send_digests(node, parts.job, snapshot)
            case messages.DigestsAnnounced():
                parts.protect.announced(message)
                parts.rebuild.announced(message)
            case messages.SnapshotOpened(_, snapshot):
                parts.protect.peer_opened(node, snapshot)
            case messages.NodeProtected(_, snapshot, fact_node):
                if fact_node == node:
                    self.collector.fact(parts.job, snapshot, node)
            case messages.NodeGaveUp(_, snapshot, loser, reason):
                self._peer_gave_up(parts.job, snapshot, loser, reason, told_by=node)
            case messages.SnapshotCommitted(_, snapshot):
                if snapshot.attempt == parts.job.attempt:
                    parts.job.commit(snapshot)
            case messages.ReadChunk():
                self._serve(node, parts.job, message)
            case messages.ChunkReply():
                parts.protect.replied(node, message)
            case messages.ChunkUnavailable():
                parts.rebuild.unavailable(node, message)
            case _:
                raise AssertionError(f"no rule for {type(message).__name__}")

    def _peer_gave_up(self, job: Job, snapshot: SnapshotId, loser: int, reason: str, *, told_by: int) -> None:
        if snapshot in job.given_up:
            return
        text = f"node {self.ctx.name_of(loser)}: {reason}" if loser < len(self.ctx.config.nodes) else reason
        job.peer_gave_up(snapshot, text[: limits.TEXT_CHARS_MAX])
        if told_by == loser and self.peers.collector == self.ctx.node:
            self.ctx.tell_all(messages.NodeGaveUp(job.name, snapshot, loser, reason))  # to the other groups

    def _heard_report(self, node: int, heard: messages.JobReport) -> None:
        parts = self.parts(heard.job) if heard.attempt else None
        if parts is None:
            return
        job = parts.job
        if heard.attempt > job.attempt:
            job.begin_attempt(heard.attempt, heard.committed)
        elif heard.attempt == job.attempt and heard.committed is not None:
            job.commit(heard.committed)
        if heard.attempt == job.attempt:
            self._compare_layouts(node, job, heard)
            for snapshot in heard.given_up:
                self._peer_gave_up(job, snapshot, node, "given up there", told_by=node)
            for snapshot in heard.open:
                if snapshot.attempt == job.attempt:
                    parts.protect.peer_opened(node, snapshot)
            for snapshot in heard.held:
                self.collector.fact(job, snapshot, node)

    def _compare_layouts(self, node: int, job: Job, heard: messages.JobReport) -> None:
        version = job.layout.version if job.layout is not None and job.planned else 0
        if heard.layout_id is not None and heard.layout_version > version:
            self.ctx.tell(node, messages.WantLayout(job.name, heard.layout_id))
        if heard.committed == job.committed and heard.committed_layout_id is not None:
            if heard.committed_layout_id in job.layouts:
                job.committed_layout_id = job.committed_layout_id or heard.committed_layout_id
            else:
                self.ctx.tell(node, messages.WantLayout(job.name, heard.committed_layout_id))

    def _send_layout(self, node: int, job: Job, layout_id: int) -> None:
        layout = job.layouts.get(layout_id)
        if layout is not None:
            current = job.planned and layout_id == job.current
            self.ctx.tell(node, messages.LayoutAnnounced(job.name, job.attempt, layout, current))

    def _send_digests(self, node: int, job: Job, snapshot: SnapshotId) -> None:
        slot = job.slot_of(snapshot)
        if slot is None or slot.phase not in COMPLETE or slot.geometry is None:
            return
        for member, count in enumerate(slot.geometry.stripes(slot.node).chunk_counts):
            for first in range(0, count, limits.DIGESTS_PER_MESSAGE_MAX):
                start = slot.digest_index(member, first)
                end = start + min(limits.DIGESTS_PER_MESSAGE_MAX, count - first)
                packed = pack_digests([digest for digest in slot.digests[start:end] if digest is not None])
                owner = slot.geometry.group_of(slot.node)[member]
                self.ctx.tell(node, messages.DigestsAnnounced(job.name, snapshot, owner, first, packed))

    def _serve(self, node: int, job: Job, wanted: messages.ReadChunk) -> None:
        slot = job.slot_of(wanted.snapshot)
        if slot is None or slot.phase not in COMPLETE or slot.geometry is None:
            text = f"{wanted.snapshot} is not held here"
            self.ctx.tell(
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
            self.ctx.tell(
                node,
                messages.ChunkUnavailable(job.name, wanted.snapshot, wanted.kind, wanted.chunk, text),
            )
            return
        header = messages.ChunkHeader(
            cluster=self.ctx.config.cluster_name,
            epoch=self.ctx.config.epoch,
            sender=self.ctx.node,
            incarnation=self.ctx.incarnation,
            job=job.name,
            snapshot=wanted.snapshot,
            node=self.ctx.node,
            kind=wanted.kind,
            chunk=wanted.chunk,
            reading=True,
        )
        offset_bytes = wanted.chunk * slot.geometry.chunk_bytes
        self.ctx.emit(ServeChunk(node, slot.memory(job.name), header, offset_bytes, digest))

    # --- restore ---

    def _ask_restore(self, client: int, question: messages.AskRestore) -> None:
        if not self.peers.settled:
            self.unsent.append((client, question))
            return
        request, self.next_request = self.next_request, self.next_request + 1
        self.asking[request] = (client, question)
        target = self.peers.collector
        if target == self.ctx.node:
            self.collector.ask(question.job, request, self.ctx.node)
        else:
            self.ctx.tell(target, messages.RestoreAsked(question.job, request))

    def _answer_queries(self) -> None:
        for query in self.collector.queries[:]:
            if not self.collector.ready(query):
                continue
            parts = self.jobs.get(query.job)
            own = report.job_report(parts.job, parts.rebuild) if parts is not None else None
            decided = self.collector.decide(query, parts.job if parts else None, own)
            if decided is None:
                continue
            self.collector.queries.remove(query)
            self.ctx.tell_all(decided)
            self._restore_decided(decided, asker=query.asker)

    def _restore_decided(self, decided: messages.RestoreDecided, asker: int | None = None) -> None:
        if not decided.problem:
            parts = self.parts(decided.job)
            if parts is not None:
                layout_id = parts.job.learn_layout(decided.layout) if decided.layout is not None else None
                parts.job.begin_attempt(decided.attempt, decided.snapshot)
                if parts.job.committed == decided.snapshot:
                    parts.job.committed_layout_id = layout_id
        if asker not in {None, self.ctx.node}:
            return
        if decided.request not in self.asking or self.asking[decided.request][1].job != decided.job:
            return
        client, question = self.asking.pop(decided.request)
        fresh = question.begin_fresh
        self.ctx.reply(
            client,
            messages.RestoreAnswer(
                job=decided.job,
                attempt=decided.attempt,
                snapshot=None if fresh else decided.snapshot,
                layout=None if fresh else decided.layout,
                problem=decided.problem,
            ),
        )

    # --- clients ---

    def _client_gone(self, client: int) -> None:
        self.clients.discard(client)
        self.unsent = [(c, question) for c, question in self.unsent if c != client]
        self.asking = {r: (c, question) for r, (c, question) in self.asking.items() if c != client}
        self.status_asked = {r: (c, due) for r, (c, due) in self.status_asked.items() if c != client}
        for parts in self.jobs.values():
            parts.job.client_gone(client)
            parts.shards.client_gone(client)

    def _client_said(self, client: int, message: messages.ClientMessage) -> None:
        match message:
            case messages.AskRestore():
                self._ask_restore(client, message)
            case messages.AskStatus():
                self._ask_status(client)
            case messages.AskRecover(node):
                self._ask_recover(client, node)
            case messages.AskForget(job):
                attempt = self.jobs[job].job.attempt if job in self.jobs else 0
                found = self.forget(job)
                if found:
                    self.ctx.tell_all(messages.JobForgotten(job, attempt))
                self.ctx.reply(client, messages.ForgetAnswer(job, found))
            case messages.Plan(job):
                parts = self.parts(job)
                if parts is None:
                    text = f"{limits.JOB_COUNT_MAX} jobs are the limit; free one with 'holdfast forget JOB'"
                    self.ctx.reply(client, messages.Denied("Plan", job, ExitCode.OVER_BUDGET, text))
                else:
                    self._make_room(parts.job, message)
                    parts.job.plan(client, message)
            case _:
                self._client_job_message(client, message)

    def _client_job_message(self, client: int, message: messages.ClientMessage) -> None:
        parts = self.jobs.get(getattr(message, "job", ""))
        if parts is None:
            text = "this node doesn't know the job yet"
            denied = messages.Denied(
                type(message).__name__,
                getattr(message, "job", ""),
                ExitCode.UNREACHABLE,
                text,
                retry=True,
            )
            self.ctx.reply(client, denied)
            return
        match message:
            case messages.Begin():
                parts.job.begin(client, message)
            case messages.Seal():
                parts.protect.seal(client, message)
                self.collector.consider(parts.job)
            case messages.Skip(_, snapshot, role, reason):
                if parts.job.roles.get(role) == client:
                    parts.job.give_up_snapshot(snapshot, f"rank {role}: {reason}")
            case messages.OpenShard():
                parts.shards.open(client, message)
            case messages.CloseShard():
                parts.job.touched_ns = self.ctx.now_ns
            case messages.Leave(_, role):
                if parts.job.roles.get(role) == client:
                    parts.job.leave(role)
            case _:
                raise AssertionError(f"no rule for {type(message).__name__}")

    def _make_room(self, job: Job, plan: messages.Plan) -> None:
        """Closed jobs give way when a new one needs their memory; the longest closed goes first."""
        geometry = job.geometry(job.learn_layout(plan.layout))
        needed = sizes_of(geometry, self.ctx.node).total_bytes * sum(s.phase is Phase.ABSENT for s in job.slots)
        closed = sorted(
            (parts.job.touched_ns, name) for name, parts in self.jobs.items() if parts.job.closed and name != job.name
        )
        for _, name in closed:
            if self.arena.refusal(needed, free_bytes=self.ctx.free_bytes) is None:
                return
            self.ctx.log(f"job {name} is closed and gives way to job {job.name}", "warning")
            self.forget(name)

    def _ask_status(self, client: int) -> None:
        target = self.peers.collector
        if target == self.ctx.node or len(self.status_asked) >= limits.CLIENT_COUNT_MAX:
            self.ctx.reply(client, messages.StatusAnswer(self.status()))
            return
        request, self.next_request = self.next_request, self.next_request + 1
        self.status_asked[request] = (client, self.ctx.seconds(limits.HEARTBEAT_S * 2))
        self.ctx.tell(target, messages.StatusWanted(request))

    def _expire_status(self) -> None:
        for request, (client, deadline_ns) in list(self.status_asked.items()):
            if self.ctx.now_ns >= deadline_ns:  # the collector is silent: better the own view than none
                del self.status_asked[request]
                self.ctx.reply(client, messages.StatusAnswer(self.status()))

    def status(self) -> dict[str, object]:
        """The cluster as this node sees it."""
        jobs = {name: parts.job for name, parts in self.jobs.items()}
        return report.status(self.ctx, self.peers, self._heartbeat(), jobs)

    # --- rebuild ---

    def _ask_recover(self, client: int, name: str | None) -> None:
        names = [node.name for node in self.ctx.config.nodes]
        if name is not None and name not in names:
            text = f"no node is named {name!r}; this cluster has {', '.join(names)}"
            self.ctx.reply(client, messages.Denied("AskRecover", "", ExitCode.USAGE, text))
            return
        targets = [names.index(name)] if name is not None else range(len(names))
        started = [target for target in targets if self._loses(target)]
        for target in started:
            self._rebuild_asked(target)
        text = f"rebuilding on {len(started)} nodes" if started else "nothing is lost: no rebuild is needed"
        self.ctx.reply(client, messages.RecoverAnswer(tuple(names[target] for target in started), text))

    def _loses(self, node: int) -> bool:
        if node == self.ctx.node:
            return any(parts.job.lost_bytes for parts in self.jobs.values())
        beat = self.peers.table[node].heartbeat if self.peers.alive(node) else None
        return beat is not None and any(job_report.lost_bytes for job_report in beat.jobs)

    def _rebuild_asked(self, target: int) -> None:
        if target == self.ctx.node:
            for parts in self.jobs.values():
                if parts.job.lost_bytes and (problem := parts.rebuild.start()):
                    self.ctx.log(f"job {parts.job.name}: no rebuild: {problem}", "warning")
        elif target in self.ctx.dialled:
            self.ctx.tell(target, messages.RebuildAsked(target))
        else:
            self.ctx.tell(self.peers.collector, messages.RebuildAsked(target))

    # --- what the shell's threads finished ---

    def _work_done(self, event: events.Event) -> None:
        match event:
            case events.MemoryReady(memory):
                if (parts := self._owner(memory)) is not None:
                    parts.job.memory_ready(memory)
                    parts.rebuild.memory_ready(memory)
            case events.MemoryFailed(memory, reason):
                if (parts := self._owner(memory)) is not None:
                    parts.job.memory_failed(memory, reason)
            case events.ChunksDigested(memory, first_chunk, digests):
                if (parts := self._owner(memory)) is not None:
                    parts.protect.digested(memory, first_chunk, digests)
                    self.collector.consider(parts.job)
            case events.ParityEncoded(memory, stripe, digest):
                if (parts := self._owner(memory)) is not None:
                    parts.protect.encoded(memory, stripe, digest)
                    self.collector.consider(parts.job)
            case events.StripeRebuilt(memory, stripe, digest, bad_positions):
                if (parts := self._owner(memory)) is not None:
                    parts.rebuild.rebuilt(memory, stripe, digest, bad_positions)
            case events.ChunksVerified(memory, ticket, bad):
                if (parts := self._owner(memory)) is not None:
                    parts.shards.verified(memory, ticket, bad)
            case events.ChunkArrived(header, digest):
                self._chunk_arrived(header, digest)
            case events.ChunkNotServed(node, header):
                text = "it fails its digest at rest"
                said = messages.ChunkUnavailable(header.job, header.snapshot, header.kind, header.chunk, text)
                self.ctx.tell(node, said)
            case (
                events.TimePassed()
                | events.PeerSaid()
                | events.PeerRefused()
                | events.ClientArrived()
                | events.ClientGone()
                | events.ClientSaid()
            ):
                raise AssertionError("handled before")
            case _:
                assert_never(event)

    def _owner(self, memory: Memory) -> JobParts | None:
        parts = self.jobs.get(memory.job)
        return parts if parts is not None and parts.job.find(memory) is not None else None

    def _chunk_arrived(self, header: messages.ChunkHeader, digest: int) -> None:
        parts = self.jobs.get(header.job)
        if parts is None or header.sender >= len(self.ctx.config.nodes):
            self.ctx.emit(DropFrames((key_of(header),)))
        elif header.reading:
            parts.rebuild.arrived(header, digest, chunk_bytes=self.ctx.config.chunk_bytes)
        else:
            parts.protect.arrived(header, digest)

    # --- the ledger ---

    def _record(self) -> LedgerRecord:
        return LedgerRecord(
            cluster=self.ctx.config.cluster_name,
            epoch=self.ctx.config.epoch,
            node=self.ctx.node,
            incarnation=self.ctx.incarnation,
            worker_session=self.ctx.worker_session,
            jobs=tuple(_job_record(parts.job) for parts in self.jobs.values()),
        )

    def resume(self, record: LedgerRecord, digests: Mapping[Memory, list[int]]) -> None:
        """Take up what a predecessor held. `digests` are the tables read back from held memory.

        What was in flight is given up: frames that the predecessor had acknowledged as received are gone.
        """
        for job_record in record.jobs:
            parts = self.parts(job_record.name)
            assert parts is not None
            job = parts.job
            job.attempt, job.closed = job_record.attempt, job_record.closed
            job.layouts = {layout.layout_id: layout for layout in job_record.layouts}
            job.current, job.planned = (
                job_record.current_layout_id,
                job_record.current_layout_id is not None,
            )
            job.committed, job.committed_layout_id = (
                job_record.committed,
                job_record.committed_layout_id,
            )
            job.given_up = list(job_record.given_up)
            lost: list[SnapshotId] = []
            for slot, slot_record in zip(job.slots, job_record.slots, strict=False):
                self._resume_slot(job, slot, slot_record, digests, lost)
            for snapshot in lost:
                job.give_up_snapshot(snapshot, "the daemon's worker restarted while it was in flight")

    def _resume_slot(
        self,
        job: Job,
        slot: Slot,
        record: SlotRecord,
        digests: Mapping[Memory, list[int]],
        lost: list[SnapshotId],
    ) -> None:
        slot.generation = record.generation
        memory = slot.memory(job.name)
        if record.phase in {"staging", "sealed"} and record.snapshot is not None:
            lost.append(record.snapshot)
        if record.layout_id is None or memory not in digests:
            return
        slot.geometry = job.geometry(record.layout_id)
        slot.phase = Phase.EMPTY
        self.arena.reserve(memory, slot.sizes.total_bytes)
        if record.phase in {"protected", "committed"} and record.snapshot is not None:
            slot.phase, slot.snapshot = Phase(record.phase), record.snapshot
            slot.digests = list(digests[memory])


def _job_record(job: Job) -> JobRecord:
    return JobRecord(
        name=job.name,
        attempt=job.attempt,
        current_layout_id=job.current if job.planned else None,
        layouts=tuple(job.layouts.values()),
        committed=job.committed,
        committed_layout_id=job.committed_layout_id,
        given_up=tuple(job.given_up),
        slots=tuple(
            SlotRecord(
                generation=slot.generation,
                phase=slot.phase.value,
                snapshot=slot.snapshot,
                layout_id=slot.geometry.layout.layout_id if slot.geometry is not None else None,
            )
            for slot in job.slots
        ),
        closed=job.closed,
    )
