"""What takes the view of many nodes: when a snapshot is committed, and which one a job restores.

Commit: whoever has seen the facts of all participants may say "committed", because a fact never becomes untrue; so
every node watches, and the lowest live one announces. Restore: the collector hears all live nodes first, then takes
the newest snapshot that any of them knows to be committed and that can be recovered from what the live ones hold.
Who is not heard may know of a newer commit: what all that are heard have protected comes first then. If there is none
such, it is the newest of the last attempt that can be recovered: who knew it to be committed may be lost.
"""

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from holdfast.daemon.core.cadences import Cadences
from holdfast.daemon.core.context import Context
from holdfast.daemon.core.job import Job
from holdfast.daemon.core.mixing import known_estates
from holdfast.daemon.core.peers import Peers
from holdfast.daemon.core.slot import Phase
from holdfast.protocol import limits, messages
from holdfast.protocol.earlier import EarlierReport
from holdfast.protocol.estates import further_losses
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.layout import Geometry, Layout
from holdfast.protocol.messages import JobReport
from msgspec import UnsetType


@dataclass(frozen=True, slots=True)
class Query:
    """A job's question what to restore, while the nodes are being heard."""

    job: str
    request: int
    asker: int
    started_ns: int
    deadline_ns: int
    number: int = 0  # this node's own of it, by which the nodes are asked
    told_ns: int = 0  # when the nodes were last told of it
    fresh: bool = False  # it does not want what is there: that it can't be recovered is no obstacle
    after: int = 0  # its attempt gets a number above this one
    passing_over: bool = False  # another epoch holds something: what can't be recovered here is passed over


class _Choices(NamedTuple):
    """What may be restored, in the order in which it is taken; newest first in each."""

    doubted: tuple[SnapshotId, ...]  # may be committed, as far as those who are heard can tell
    committed: tuple[SnapshotId, ...]
    protected: tuple[SnapshotId, ...]  # by some nodes


@dataclass(slots=True)
class Collector:
    """Facts of all jobs, and open questions."""

    ctx: Context
    peers: Peers
    facts: dict[str, dict[SnapshotId, set[int]]] = field(default_factory=dict)
    queries: list[Query] = field(default_factory=list)
    cadences: Cadences = field(default_factory=Cadences)
    refused: dict[str, tuple[str, ...]] = field(default_factory=dict)  # job -> why newer ones than the last choice
    heard_s: dict[str, float] = field(default_factory=dict)  # job -> how long hearing all nodes took
    newest: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)  # (job, asker) -> its newest question
    waits_for: dict[tuple[str, int, int], int] = field(default_factory=dict)  # question -> a node that is not heard yet

    # --- commit ---

    def fact(self, job: Job, snapshot: SnapshotId, node: int) -> None:
        """A node has protected a snapshot."""
        if snapshot.attempt != job.attempt or (job.committed is not None and snapshot <= job.committed):
            return
        facts = self.facts.setdefault(job.name, {})
        facts.setdefault(snapshot, set()).add(node)
        if len(facts) > limits.SLOTS_COUNT_MAX:
            del facts[max(facts)]  # more than can be held anywhere; heartbeats state the true ones again
        self.consider(job)

    def reborn(self, node: int) -> None:
        """Another holds this node's place now, with empty memory: what its predecessor stated is true no more."""
        for facts in self.facts.values():
            for nodes in facts.values():
                nodes.discard(node)
        open_ones = {(query.job, query.asker) for query in self.queries}
        self.newest = {key: value for key, value in self.newest.items() if key[1] != node or key in open_ones}

    def consider(self, job: Job) -> None:
        """Commit what all participants have protected."""
        if not job.planned or job.current is None:
            return
        own = {slot.snapshot for slot in job.slots if slot.snapshot is not None and slot.phase is Phase.PROTECTED}
        open_facts = self.facts.get(job.name, {})
        participants = job.geometry(job.current).participants
        for snapshot in sorted(own | set(open_facts), reverse=True):
            seen = open_facts.get(snapshot, set()) | ({self.ctx.node} if snapshot in own else set())
            # Counted first: of thousands of facts only the last one is worth comparing the sets.
            enough = len(participants) <= len(seen)
            if enough and snapshot.attempt == job.attempt and participants <= seen:
                job.commit(snapshot)
                if job.committed == snapshot and self.peers.collector == self.ctx.node:
                    self.ctx.tell_all(messages.SnapshotCommitted(job.name, snapshot))
                break
        if job.committed is not None:
            self.facts[job.name] = {
                snapshot: nodes
                for snapshot, nodes in open_facts.items()
                if snapshot > job.committed and snapshot.attempt >= job.attempt
            }

    def consider_cadence(self, job: Job) -> None:
        """After a commit: announce a cadence that suits the pace of protection better, if there is one."""
        if self.peers.collector != self.ctx.node or not self.peers.settled or not self.cadences.is_news(job):
            return
        reports = [job.pace_report(), *(report.pace for report in self.peers.reports(job.name).values())]
        cadence = self.cadences.consider(job, reports)
        if cadence is None:
            return
        text = f"job {job.name}: every {cadence.every} steps from step {cadence.from_step} on, instead of {job.every}"
        self.ctx.log(f"{text}: a snapshot takes {max(report.cycle_s for report in reports):.2f} s")
        job.adopt_cadence(job.attempt, cadence)

    def forget(self, job: str) -> None:
        """Nothing of this job matters any more."""
        self.cadences.forget(job)
        self.facts.pop(job, None)
        open_ones = {(query.job, query.asker) for query in self.queries}  # they are answered yet, and once
        self.newest = {key: value for key, value in self.newest.items() if key[0] != job or key in open_ones}

    # --- restore ---

    def ask(self, said: messages.RestoreAsked, asker: int) -> Query | None:
        """Somebody wants to know what to restore: hear all live nodes, then decide. None: it does not count."""
        job, request = said.job, said.request
        number = self.peers.incarnation_of(asker), request  # grows from question to question
        if not self._is_news(job, asker, number):
            return None  # heard twice, or late: another answer would begin another attempt, for which no rank waits
        self.queries = [q for q in self.queries if (q.job, q.asker) != (job, asker)]  # it asks again
        self.waits_for.clear()  # of questions that are not open any more; the open ones look again
        if len(self.queries) >= limits.JOB_COUNT_MAX:
            return None  # the asker repeats its question
        self.newest[job, asker] = number
        now_ns, deadline_ns = self.ctx.now_ns, self.ctx.seconds(limits.HEAR_ALL_S)
        query = Query(job, request, asker, now_ns, deadline_ns, self.ctx.new_request(), told_ns=now_ns)
        query = replace(query, fresh=said.begin_fresh, after=said.after, passing_over=said.passing_over)
        self.queries.append(query)
        self.ctx.tell_all(messages.ReportWanted(query.number, job))
        return query

    def answered_elsewhere(self, job: str, asker: int, request: int) -> None:
        """Another collector has answered: what this asker asked before, and may arrive yet, a dead rank asked."""
        if asker >= len(self.ctx.config.nodes):
            return
        number = self.peers.incarnation_of(asker), request
        if self._is_news(job, asker, number):
            self.newest[job, asker] = number
        self.queries = [q for q in self.queries if (q.job, q.asker) != (job, asker) or q.request > request]
        self.waits_for.clear()

    def _is_news(self, job: str, asker: int, number: tuple[int, int]) -> bool:
        return number > self.newest.get((job, asker), (0, 0))

    def tell_again(self) -> None:
        """Repeat open questions to those that have not answered: a message may be lost with its connection."""
        for index, query in enumerate(self.queries):
            if self.ctx.now_ns >= query.told_ns + int(limits.HEARTBEAT_S * 1e9):
                self.queries[index] = replace(query, told_ns=self.ctx.now_ns)
                for node in sorted(self.unheard(query)):
                    self.ctx.tell(node, messages.ReportWanted(query.number, query.job))

    def excuse(self, nanoseconds: int) -> None:
        """This node stood still for so long: those whom it asked get that time, too."""
        self.queries = [replace(query, deadline_ns=query.deadline_ns + nanoseconds) for query in self.queries]

    def unheard(self, query: Query) -> set[int]:
        """Live nodes that have not said since the question came what they hold, and that it stays so until decided."""
        return {node for node in self.peers.table if self._is_unheard(node, query)}

    def _is_unheard(self, node: int, query: Query) -> bool:
        peer = self.peers.table[node]
        if not self.peers.alive(node):
            return False
        report = peer.report(query.job)
        if peer.heartbeat_ns < query.started_ns or report is None:
            return peer.heartbeat_ns < query.started_ns
        if isinstance(report.paused_for, UnsetType):
            return not report.paused  # of an earlier version
        return not report.paused or (self.ctx.node, query.number) not in report.paused_for

    def _waits_for_one(self, query: Query) -> bool:
        """Whether any node is unheard. Looks first at the one that it last waited for, and goes on from there.

        Each of N nodes answers a question, and each answer asks this: looking at all of them would take N * N looks.
        """
        key, table = (query.job, query.asker, query.request), self.peers.table
        start = self.waits_for.pop(key, 0)
        count = len(self.ctx.config.nodes)
        for step in range(count):
            node = (start + step) % count
            if node in table and self._is_unheard(node, query):
                self.waits_for[key] = node
                return True
        return False

    def ready(self, query: Query) -> bool:
        """Whether every node that may be alive was heard since the question came, or can't be waited for any longer.

        Who lives and was not heard may commit something newer meanwhile and free what it said it holds: it speaks
        soon, or is soon known to be down.
        """
        if self.peers.denied:
            return False  # whoever holds this node's slot decides: the others tell this one nothing
        if self.ctx.now_ns < query.deadline_ns:
            return not self._waits_for_one(query) and self.peers.settled
        return not self._waits_for_one(query) or self.ctx.now_ns >= query.deadline_ns + int(
            limits.PEER_DEADLINE_S * 1e9
        )

    def decide(
        self,
        query: Query,
        job: Job | None,
        own: JobReport | None,
        *,
        attempts_over: int = 0,
        unheard: AbstractSet[int] = frozenset(),
        paused: bool = False,
    ) -> messages.RestoreDecided | None:
        """The answer to a question; None while a layout that it needs is still being fetched.

        `attempts_over`: numbers up to this one belong to a life of the job that was forgotten. `unheard`: nodes whose
        last word can't be trusted any more; they count as lost. `paused`: all others keep what they say they hold
        until they hear the answer, which pins it: so it need not be known to be committed.
        """
        reports = self.peers.reports(query.job)
        if own is not None:
            reports[self.ctx.node] = own
        last = max((report.attempt for report in reports.values()), default=0)
        attempt = max(last, attempts_over, query.after) + 1
        reports = {node: report for node, report in reports.items() if node not in unheard}
        all_heard = not unheard and self.peers.all_heard
        if not all_heard:
            # Who is not heard may know of later attempts, and hold what they staged: the time is later than any.
            attempt = max(attempt, self.ctx.wall_ms)
        if attempt > limits.STEP_MAX:
            text = f"an attempt {attempt - 1} was heard of, after which none can be numbered; give the job another name"
            return messages.RestoreDecided(query.job, query.request, 0, None, None, problem=text)
        candidates = sorted({report.committed for report in reports.values() if report.committed}, reverse=True)
        protected: list[SnapshotId] = []
        if paused and last >= attempts_over and (candidates or not all_heard):  # else nobody can know of a commit
            protected = _protected_after(candidates[0] if candidates else None, last, reports)
        if job is None or not (candidates or protected):
            return messages.RestoreDecided(query.job, query.request, attempt, None, None)
        doubted = () if all_heard else tuple(protected)  # who is not heard may know them to be committed
        return self._choose(query, job, reports, attempt, _Choices(doubted, tuple(candidates), tuple(protected)))

    def _choose(
        self,
        query: Query,
        job: Job,
        reports: dict[int, JobReport],
        attempt: int,
        choices: _Choices,
    ) -> messages.RestoreDecided | None:
        """The first that can be had."""
        doubted, candidates, protected = choices
        problems: list[str] = []  # one of each that is refused, in this order
        doubt = ""  # why what may be committed can't be had
        kept: tuple[SnapshotId, Layout] | None = None
        for place, snapshot in enumerate((*doubted, *candidates, *protected)):
            layout = self._layout_of(snapshot, job, reports)
            if layout is None and self.ctx.now_ns < query.deadline_ns:
                return None
            geometry = job.geometry(job.learn_layout(layout)) if layout is not None else None
            is_doubted = place < len(doubted)
            if is_doubted and not _held_by_all(snapshot, geometry, reports):
                continue  # one that is heard has not stated its fact
            if layout is None or geometry is None:
                problems.append(f"{snapshot}: no live node knows its layout")
                continue
            if not query.passing_over and (snapshot in candidates or not candidates):
                kept = kept or (snapshot, layout)  # what is known to be committed, if anything is
            problem = self._problem(snapshot, geometry, reports)
            if not problem:
                if snapshot in protected:
                    text = f"job {query.job}: {snapshot} is whole on the live nodes; who knew more of it may be lost"
                    self.ctx.log(f"{text}; it is restored{f', since {problems[0]}' if problems else ''}", "warning")
                self.refused[query.job] = tuple(problems)
                self.heard_s[query.job] = (self.ctx.now_ns - query.started_ns) / 1e9
                return messages.RestoreDecided(query.job, query.request, attempt, snapshot, layout)
            if is_doubted:
                doubt = doubt or f"{problem}; who is silent may know it to be committed"
            else:
                problems.append(problem)
        if query.fresh or query.passing_over or not (candidates or doubt):
            # Who can't be heard now may hold it, and another life may want it: only a newer commit takes its place.
            return messages.RestoreDecided(query.job, query.request, attempt, *(kept or (None, None)))
        told = problems[: len(candidates)] or [doubt]  # of the others nobody was told that they were safe
        problem = "; ".join(told)[:4000]
        return messages.RestoreDecided(query.job, query.request, 0, None, None, problem=problem)

    def complete(self) -> bool:
        """Whether every node of this epoch has been heard, though it may be down now."""
        return all(peer.heartbeat is not None for peer in self.peers.table.values())

    def earlier_at(self, job: str) -> int | None:
        """The lowest live node that still serves the epoch before for a job."""
        told = {node: peer.heartbeat.earlier for node, peer in self.peers.table.items() if peer.heartbeat is not None}
        told[self.ctx.node] = self.ctx.earlier
        keeping = {node for node, kept in told.items() if isinstance(kept, EarlierReport) and job in kept.jobs}
        return min(keeping & set(self.peers.live()), default=None)

    def _layout_of(self, snapshot: SnapshotId, job: Job, reports: dict[int, JobReport]) -> Layout | None:
        for node, report in reports.items():
            of_this_plan = snapshot.attempt == report.attempt and snapshot in report.held
            layout_id = report.committed_layout_id if report.committed == snapshot else report.layout_id
            if layout_id is None or not (report.committed == snapshot or of_this_plan):
                continue
            layout = job.layouts.get(layout_id)
            if layout is None:
                self.ctx.tell(node, messages.WantLayout(job.name, layout_id))
            elif report.committed == snapshot or snapshot.step >= layout.first_step:
                return layout  # what was staged before the newest plan may have another: nobody tells which
        return None

    def _problem(self, snapshot: SnapshotId, geometry: Geometry, reports: dict[int, JobReport]) -> str:
        """Why a snapshot can't be recovered from what live nodes hold; empty if it can."""
        for group, lost in lost_by_group(snapshot, geometry, reports).items():
            if more_losses(snapshot, geometry, reports, group, lost) < 0:
                names = ", ".join(self.ctx.name_of(node) for node in lost)
                return (
                    f"{snapshot} is not recoverable: of a group of {len(group)} nodes {len(lost)} are lost ({names}), "
                    f"parity {geometry.parity_count} covers {geometry.parity_count}; needed: the memory of at least "
                    f"{len(lost) - geometry.parity_count} of them, or parity {len(lost)}"
                )
        return ""

    def check(self) -> None:
        """Assert: facts only of what can be held, and one open question an asker, its newest."""
        assert all(len(facts) <= limits.SLOTS_COUNT_MAX for facts in self.facts.values())
        assert len(self.queries) <= limits.JOB_COUNT_MAX
        assert len({(query.job, query.asker) for query in self.queries}) == len(self.queries)
        for query in self.queries:
            assert query.request <= self.newest[query.job, query.asker][1], "a newer question of this asker is known"


def more_losses(
    snapshot: SnapshotId,
    geometry: Geometry,
    reports: Mapping[int, JobReport],
    group: tuple[int, ...],
    lost: Iterable[int],
) -> int:
    """How many more nodes of a group can be lost, whichever they are; below 0: too many are lost already.

    Args:
        snapshot: what must be had.
        geometry: its sizes and stripes.
        reports: what live nodes say they hold, also of what absent ones left.
        group: whose loss is asked for.
        lost: its nodes that lack what they should hold.
    """
    known = known_estates(reports, (-1, ()), snapshot=snapshot, geometry=geometry, group=group)
    members = {group.index(node) for node in lost}
    estates = [(k.estate, {group.index(node) for node in k.holders} - members) for k in known]
    return further_losses(geometry.stripes(group[0]), members, estates)


def _protected_after(committed: SnapshotId | None, attempt: int, reports: Mapping[int, JobReport]) -> list[SnapshotId]:
    """Newer snapshots of an attempt that some nodes have protected and nobody has denied, newest first.

    Enough of them to decode it prove that such a one is whole: a fact says that all chunks of a stripe came, each with
    its digest, and a node sends them only when all its ranks have sealed.
    """
    held = {snapshot for report in reports.values() for snapshot in report.held}
    denied = {snapshot for report in reports.values() for snapshot in report.given_up}
    newer = (s for s in held - denied if s.attempt == attempt and (committed is None or s > committed))
    return sorted(newer, reverse=True)


def _held_by_all(snapshot: SnapshotId, geometry: Geometry | None, reports: Mapping[int, JobReport]) -> bool:
    """Whether all that are heard, of those that take part, have stated their fact: so it may have been committed."""
    heard = geometry.participants & reports.keys() if geometry is not None else frozenset[int]()
    return bool(heard) and all(snapshot in reports[node].held for node in heard)


def lost_by_group(
    snapshot: SnapshotId, geometry: Geometry, reports: dict[int, JobReport]
) -> dict[tuple[int, ...], list[int]]:
    """For each group that takes part: its nodes that should hold some of the snapshot and don't, or are silent."""
    lost: dict[tuple[int, ...], list[int]] = {}
    for group in geometry.placement.groups:
        if not set(group) & geometry.participants:
            continue
        lost[group] = [
            node
            for node in group
            if (node not in reports or snapshot not in reports[node].held)
            and geometry.data_bytes(node) + geometry.parity_bytes(node) > 0
        ]
    return lost
