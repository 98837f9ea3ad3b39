"""What other nodes say, and what this node does about it.

Covers the conversation between daemons: who is accepted, which part of the core hears which message, and the answers to
a peer that lacks a layout, digests or a chunk.
"""

from dataclasses import dataclass, field

from holdfast.daemon.core import events, serving
from holdfast.daemon.core.asks import Asks
from holdfast.daemon.core.collector import Collector
from holdfast.daemon.core.context import Context
from holdfast.daemon.core.job import Job
from holdfast.daemon.core.offers import Offers
from holdfast.daemon.core.peers import Peers
from holdfast.daemon.core.pursuits import Pursuits
from holdfast.daemon.core.ranges import Ranges
from holdfast.daemon.core.registry import Registry
from holdfast.daemon.core.restoring import Restoring
from holdfast.daemon.core.slot import COMPLETE
from holdfast.daemon.core.sums import Sums
from holdfast.daemon.core.trace_asks import TraceAsks
from holdfast.protocol import limits, messages
from holdfast.protocol.health import ChunkSuspected, DrillAsked, FingerprintsGiven, WantFingerprints
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.trace import TraceGiven, TraceWanted


@dataclass(slots=True)
class PeerSide:
    """The ear for other daemons."""

    ctx: Context
    peers: Peers
    registry: Registry
    collector: Collector
    restoring: Restoring
    asks: Asks
    sums: Sums
    pursuits: Pursuits
    offers: Offers
    ranges: Ranges
    trace_asks: TraceAsks
    unsaid: dict[str, tuple[int, int]] = field(default_factory=dict)  # kind -> (said again from, unsaid count)

    def refused(self, event: events.PeerRefused) -> None:
        """A peer, or something that claims to be one, was refused, or refuses us."""
        who = "a stranger" if event.node is None else f"node {self.ctx.name_of(event.node)}"
        text = f"we refuse {who}: {event.text}" if event.by_us else f"{who} refuses us: {event.text}"
        if event.node is None:
            # Anybody can connect, so the log takes one line per kind of refusal and pause, whatever comes.
            self._log_now_and_then(f"{event.code} {event.text.partition(':')[0]}", text)  # the code, and the plane
            return
        behind = event.incarnation > self.ctx.incarnation  # else it speaks of another that would be this node
        if event.code == "superseded" and (self.peers.alive(event.node) if event.by_us else not behind):
            # Whoever holds the slot speaks as well, and both go on: that one is not refused.
            if not event.by_us and event.node in self.peers.table and 0 < event.incarnation < self.ctx.incarnation:
                self.peers.table[event.node].denied_ns = self.ctx.now_ns
            if not event.by_us and event.incarnation == self.ctx.incarnation:
                text = f"{who} has heard two daemons that are this node: {event.text}"
            self._log_now_and_then(f"superseded {event.node}", text)
            return
        if event.node != self.ctx.node:
            peer = self.peers.table[event.node]
            peer.behind = peer.behind or event.code == "epoch"
            if peer.refused == text:
                return
            peer.refused = text
            if event.code == "superseded" and not event.by_us and self._holds_anything():
                text += "; if that one is gone for good, start this daemon again, with empty memory: it is rebuilt then"
            elif event.code == "superseded" and not event.by_us:
                # This is a fresh replacement whose clock lags: take the slot over. It may know jobs already, since it
                # believes the others while they refuse it.
                self.ctx.incarnation = min(event.incarnation + 1, limits.STEP_MAX)
                text += f"; going on as incarnation {self.ctx.incarnation}"
        self.ctx.log(text, "error")

    def _log_now_and_then(self, kind: str, text: str) -> None:
        said_from_ns, unsaid_count = self.unsaid.get(kind, (0, 0))
        if self.ctx.now_ns < said_from_ns:
            self.unsaid[kind] = said_from_ns, unsaid_count + 1
            return
        self.unsaid[kind] = self.ctx.seconds(limits.REFUSAL_PAUSE_S), 0
        text += f" (and {unsaid_count} more refusals of this kind before)" if unsaid_count else ""
        self.ctx.log(text, "error")

    def _holds_anything(self) -> bool:
        return any(slot.phase in COMPLETE for parts in self.registry for slot in parts.job.slots)

    def said(self, event: events.PeerSaid) -> None:
        """A checked frame came from another node."""
        message = event.message
        beat = message if isinstance(message, messages.Heartbeat) else None
        if beat is not None and beat.config_digest != self.ctx.config_digest:
            text = f"expected config digest {self.ctx.config_digest}, found {beat.config_digest}: its file differs"
            self._refuse(event.node, "config", text)
            return
        known = self.peers.table[event.node].incarnation
        accepted, lost_flight = self.peers.heard(event.node, event.incarnation, beat)
        if not accepted:
            text = self._why_not(event.node, event.incarnation, known)
            if not isinstance(message, messages.Refused):  # two that refuse each other would never stop
                self._refuse(event.node, "superseded", text, incarnation=known)
            return
        if known not in {0, event.incarnation}:
            self.collector.reborn(event.node)
        if lost_flight:
            self.flight_lost(event.node, restarted=True)
        self._peer_message(event.node, message)

    def _refuse(self, node: int, code: str, text: str, *, incarnation: int = 0) -> None:
        self.refused(events.PeerRefused(node, code, text, by_us=True))
        assert code in {"config", "superseded"}
        self.ctx.tell(
            node,
            messages.Refused("config" if code == "config" else "superseded", text, incarnation),
        )

    def _why_not(self, node: int, incarnation: int, known: int) -> str:
        if incarnation < known:
            return f"incarnation {incarnation} is superseded by {known}, which holds this node's slot"
        return (
            f"incarnation {incarnation} has to wait until {known}, which holds this node's slot, is silent for "
            f"{limits.PEER_DEADLINE_S} s; if both run on, stop the daemon that is not to be {self.ctx.name_of(node)}"
        )

    def flight_lost(self, node: int, *, restarted: bool) -> None:
        """A peer went silent or came back as another process: what was in flight to it is gone."""
        if restarted:
            self.sums.wanter_lost(node)
        for parts in self.registry:
            parts.protect.peer_lost_flight(node, restarted=restarted)

    def _peer_message(self, node: int, message: messages.PeerMessage) -> None:
        match message:
            case messages.Heartbeat():
                for job_report in message.jobs:
                    self._heard_report(node, job_report)
                self.offers.heard()
                self.ranges.heard()
                self.restoring.answer()  # this may have been the last node that a question waited for
            case messages.ReportWanted(request, job):
                self.registry.pause_commits(job, (node, request))
                self.ctx.tell(node, self.registry.heartbeat(job, (node, request)))
            case messages.RestoreAsked():
                self.restoring.asked(message, node)
            case messages.RestoreDecided():
                self.restoring.decided(message, node)
            case DrillAsked(stripes, pass_on):
                self.asks.drill_here(stripes, pass_on=pass_on)
            case messages.RebuildAsked(target):
                self.asks.rebuild(target)
            case messages.StatusWanted(request):
                self.ctx.tell(node, messages.StatusGiven(request, self.registry.told_status()))
            case messages.StatusGiven(request, status):
                self.asks.status_given(request, status)
            case messages.Refused(code, text, incarnation):
                self.refused(events.PeerRefused(node, code, text, by_us=False, incarnation=incarnation))
            case messages.JobForgotten(job, attempt):
                parts = self.registry.get(job)
                if parts is not None and parts.job.attempt <= attempt and self.registry.forget(job):
                    self.ctx.tell_all(message)  # the collector passes it on to the other groups
            case _:
                self._peer_reading_message(node, message)

    def _peer_reading_message(self, node: int, message: messages.PeerMessage) -> None:
        match message:
            case messages.DigestsAnnounced():
                self.ranges.announced(message)
                self._peer_job_message(node, message)
            case messages.SumsWanted() | messages.MixesWanted():
                self.sums.wanted(node, message)
            case messages.SumFailed():
                self.pursuits.part_failed(node, message)
            case messages.SumWitness():
                self.pursuits.witnessed(node, message)
            case messages.CommittedWanted():
                self.offers.wanted(node, message)
            case messages.CommittedGiven():
                self.offers.given(message)
            case TraceWanted():
                self.trace_asks.wanted(node, message)
            case TraceGiven():
                self.trace_asks.given(message)
            case messages.EarlierWanted() | messages.EarlierGiven():
                self.ctx.about_earlier.append((node, message))  # heard by whoever has both epochs
            case _:
                self._peer_job_message(node, message)

    def _peer_job_message(self, node: int, message: messages.PeerMessage) -> None:
        name = getattr(message, "job", "")
        new = isinstance(message, messages.LayoutAnnounced) and not self.registry.is_forgotten(name, message.attempt)
        parts = self.registry.obtain(name) if new else self.registry.get(name)
        if parts is None:
            return
        parts.healing.said(node, message)
        match message:
            case messages.WantLayout(_, layout_id):
                serving.send_layout(self.ctx, node, parts.job, layout_id)
            case messages.LayoutAnnounced(_, attempt, layout, current):
                if current:
                    parts.job.adopt_plan(attempt, layout)
                else:
                    parts.job.learn_layout(layout)
                self.collector.consider(parts.job)
            case messages.WantDigests(_, snapshot):
                serving.send_digests(self.ctx, node, parts.job, snapshot)
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
                serving.serve_chunk(self.ctx, node, parts.job, message)
            case messages.ChunkReply():
                parts.protect.replied(node, message)
            case messages.ChunkUnavailable() | WantFingerprints() | FingerprintsGiven() | ChunkSuspected():
                pass  # heard above
            case _:
                raise AssertionError(f"no rule for {type(message).__name__}")

    def _peer_gave_up(self, job: Job, snapshot: SnapshotId, loser: int, reason: str, *, told_by: int) -> None:
        if snapshot in job.given_up:
            return
        slot = job.slot_of(snapshot)
        if slot is not None and slot.phase in COMPLETE and self.ctx.now_ns < job.pause_ns:
            return  # what was told to be held must hold until it is decided what is restored; heartbeats deny it again
        collector = self.peers.collector
        if told_by not in self.ctx.group and collector not in {told_by, self.ctx.node}:
            return  # its own group and the collector hear it, who know whether another holds its place by now
        text = f"node {self.ctx.name_of(loser)}: {reason}" if loser < len(self.ctx.config.nodes) else reason
        job.peer_gave_up(snapshot, text[: limits.TEXT_CHARS_MAX])
        if told_by == loser and self.peers.collector == self.ctx.node:
            self.ctx.tell_all(messages.NodeGaveUp(job.name, snapshot, loser, reason))  # to the other groups

    def _heard_report(self, node: int, heard: messages.JobReport) -> None:
        known = heard.attempt and not self.registry.is_forgotten(heard.job, heard.attempt)
        parts = self.registry.obtain(heard.job) if known else None
        if parts is None:
            return
        job = parts.job
        if heard.attempt > job.attempt:
            job.begin_attempt(heard.attempt, heard.committed, late=True)
        elif heard.attempt == job.attempt and heard.committed is not None:
            job.commit(heard.committed)
        if heard.attempt == job.attempt:
            self._compare_layouts(node, job, heard)
            for cadence in heard.pace.cadences:  # the one in force first: a restarted worker knows neither
                job.adopt_cadence(heard.attempt, cadence)
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
            if heard.committed_layout_id in job.layouts.known:
                job.committed_layout_id = job.committed_layout_id or heard.committed_layout_id
            else:
                self.ctx.tell(node, messages.WantLayout(job.name, heard.committed_layout_id))
