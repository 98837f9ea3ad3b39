"""Two epochs side by side in one worker, while a cluster grows or shrinks: the one in force, and the one before.

Each is a whole core of its own (`Node`): its list of nodes, groups, peers, jobs and ledger; none of the rules of one
epoch changes. Covers what joins the two: the budget that they share, which of them hears what a client says, how a job
moves, and when the epoch before is over.

A job moves with its next start. Its question what to restore begins an attempt in both epochs, first in the one before,
so that nothing of it can commit there afterwards; the attempt in force gets the higher number. What the epoch in force
has committed is the answer; else what the one before has, which is read there. If nodes of the new list were never
heard, nothing could commit in it: then the job goes on in the epoch before, under a third number. Until it starts
again, a job that runs stays where it is.

The epoch before lets a job go as soon as this node knows of a commit in the epoch in force, and is over when no job is
left in it. Until then its spare slots give way to the plans of jobs that have moved.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from holdfast.daemon.core import events
from holdfast.daemon.core.actions import Action, Free, ReplyClient
from holdfast.daemon.core.node import Node
from holdfast.daemon.core.peers import Peer
from holdfast.daemon.core.registry import JobParts
from holdfast.daemon.core.report import VERDICTS
from holdfast.daemon.core.slot import Phase
from holdfast.protocol import limits, messages
from holdfast.protocol.earlier import EarlierGiven, EarlierReport, EarlierWanted
from holdfast.protocol.exit_codes import ExitCode
from msgspec import UNSET, structs

Decided = list[tuple[Node, Action]]  # whose hands carry it out, and what
Then = Callable[[messages.DaemonMessage], None]
IDLE_S = 60.0  # a job that has committed nothing and plans nothing for so long has nothing to keep
REMOTE_S = 2 * limits.HEAR_ALL_S + limits.JOIN_S  # as long as a rank waits for an answer before it asks again


@dataclass(frozen=True, slots=True)
class Asked:
    """A question put to one core on behalf of a client, as if another client of this node had it."""

    core: Node
    client: int
    then: Then


@dataclass(frozen=True, slots=True)
class Sought:
    """A question to another node's epoch before, for a client of this one."""

    client: int
    question: messages.AskRestore
    deadline_ns: int


@dataclass(slots=True)
class Epochs:
    """The cores of one worker."""

    current: Node
    earlier: Node | None = None
    homes: dict[tuple[int, str], Node] = field(default_factory=dict)  # (client, job) -> where it planned or opened last
    asked: dict[int, Asked] = field(default_factory=dict)  # by the number of the client that does not exist
    sought: dict[int, Sought] = field(default_factory=dict)
    questions: dict[int, messages.AskRestore] = field(default_factory=dict)  # client -> as it goes to `current` alone
    decided: Decided = field(default_factory=list)
    pretended: int = 0

    # --- the one door ---

    @property
    def cores(self) -> Iterator[Node]:
        """The epoch before first: what it frees, the other may take."""
        if self.earlier is not None:
            yield self.earlier
        yield self.current

    def start(self) -> Decided:
        """The first actions of a worker's life."""
        for core in self.cores:
            self._take(core, core.start())
        return self._end_turn()

    def handle(self, event: events.Event, now_ns: int, core: Node | None = None) -> Decided:
        """Apply one event; `core`: whose peers, threads or memory it is about, if it is not about all."""
        match event:
            case events.TimePassed() | events.ClientArrived():
                for one in self.cores:
                    self._feed(one, event, now_ns)
            case events.ClientGone(client):
                for one in self.cores:
                    self._feed(one, event, now_ns)
                self._forget(client, now_ns)
            case events.ClientSaid(client, message):
                if client in self.current.clients:
                    self._said(client, message, now_ns)
            case _:
                assert core is not None
                if isinstance(event, events.PeerSaid) and isinstance(event.message, messages.LayoutAnnounced):
                    self._make_way(core, event.message.job, event.message.attempt)
                self._feed(core, event, now_ns)
        if isinstance(event, events.TimePassed):
            self.sought = {number: one for number, one in self.sought.items() if now_ns < one.deadline_ns}
        return self._end_turn()

    def _feed(self, core: Node, event: events.Event, now_ns: int) -> None:
        self._take(core, core.handle(event, max(now_ns, core.ctx.now_ns)))

    def _take(self, core: Node, actions: list[Action]) -> None:
        answers: list[tuple[Asked, messages.DaemonMessage]] = []
        for action in actions:
            if isinstance(action, ReplyClient) and action.client < 0:
                if (asked := self.asked.pop(action.client, None)) is not None:
                    answers.append((asked, action.message))
                    self._leave(core, action.client)
            elif isinstance(action, ReplyClient) and (seen := self._seen(core, action)) is not action:
                if seen is not None:
                    self.decided.append((core, seen))
            else:
                self.decided.append((core, action))
        for asked, message in answers:
            asked.then(message)

    def _end_turn(self) -> Decided:
        heard, self.current.ctx.about_earlier = self.current.ctx.about_earlier, []
        for node, message in heard:
            self._about_earlier(node, message)
        if self.earlier is not None:
            self.earlier.ctx.about_earlier.clear()  # nobody asks there for one before it
            self._let_go(self.earlier)
        decided, self.decided = self.decided, []
        return decided

    def _reply(self, client: int, message: messages.DaemonMessage) -> None:
        self.decided.append((self.current, ReplyClient(client, message)))

    # --- asking one core for somebody ---

    def _ask(self, core: Node, client: int, message: messages.ClientMessage, then: Then) -> None:
        self.pretended -= 1
        number, now_ns = self.pretended, core.ctx.now_ns
        self.asked[number] = Asked(core, client, then)
        self._take(core, core.handle(events.ClientArrived(number, 0), now_ns))
        self._take(core, core.handle(events.ClientSaid(number, message), now_ns))

    def _leave(self, core: Node, number: int) -> None:
        self._take(core, core.handle(events.ClientGone(number), core.ctx.now_ns))

    def _forget(self, client: int, now_ns: int) -> None:
        """A client ended, or asks anew."""
        del now_ns
        for number, asked in list(self.asked.items()):
            if asked.client == client:
                del self.asked[number]
                self._leave(asked.core, number)
        self.sought = {number: one for number, one in self.sought.items() if one.client != client}
        self.questions.pop(client, None)
        self.homes = {key: core for key, core in self.homes.items() if key[0] != client}

    # --- what clients say ---

    def _said(self, client: int, message: messages.ClientMessage, now_ns: int) -> None:
        earlier, event = self.earlier, events.ClientSaid(client, message)
        if isinstance(message, messages.AskRestore):
            self._ask_restore(client, message, now_ns)
            return
        if isinstance(message, messages.Plan | messages.OpenShard):
            self._at_home(client, message, now_ns)
            return
        if earlier is None:
            self._feed(self.current, event, now_ns)
            return
        match message:
            case messages.ReadRange(job, snapshot):
                self._feed(self._reads(earlier, job, snapshot.attempt, snapshot.step), event, now_ns)
            case messages.CloseRange():
                for core in self.cores:
                    self._feed(core, event, now_ns)
            case messages.AskRecover() | messages.AskDrill() | messages.AskForget():
                self._ask(earlier, client, message, lambda _: None)
                self._feed(self.current, event, now_ns)
            case _:
                core = self.homes.get((client, getattr(message, "job", "")), self.current)
                self._feed(core, event, now_ns)

    def _at_home(self, client: int, message: messages.Plan | messages.OpenShard, now_ns: int) -> None:
        """What names its epoch goes there; what names none goes where it always went, if there is but one."""
        core = next((one for one in self.cores if one.ctx.config.epoch == message.epoch), None)
        if core is None and message.epoch == 0 and self.earlier is None:
            core = self.current
        if core is None:
            mine = " and ".join(str(one.ctx.config.epoch) for one in self.cores)
            text = f"expected epoch {mine}, which this daemon serves, found epoch {message.epoch}"
            hint = "start the job again" if message.epoch else "it tells none: install this version of holdfast for it"
            denied = messages.Denied(type(message).__name__, message.job, ExitCode.WRONG_CLUSTER, f"{text}; {hint}")
            self._reply(client, denied)
            return
        self.homes[client, message.job] = core
        if isinstance(message, messages.Plan):
            self._make_way(core, message.job, message.attempt)
        self._feed(core, events.ClientSaid(client, message), now_ns)

    def _reads(self, earlier: Node, job: str, attempt: int, step: int) -> Node:
        """The epoch in which a snapshot was staged. A number of an attempt is used in one of them only."""
        new, old = self.current.jobs.get(job), earlier.jobs.get(job)
        if old is None or (new is not None and (new.job.committed or (0, 0)) == (attempt, step)):
            return self.current
        return earlier if attempt <= old.job.attempt else self.current

    def _seen(self, core: Node, action: ReplyClient) -> ReplyClient | None:
        """An answer on its way to a real client: as it is, changed, or None if another one follows."""
        match action.message:
            case messages.RestoreAnswer() if core is self.current and action.client in self.questions:
                question = self.questions.pop(action.client)
                if action.message.snapshot is None:
                    return self._seek(action, question)
            case messages.CommittedAnswer(job, snapshot=None) if core is self.current and self.earlier is not None:
                self._take(
                    self.earlier,
                    self.earlier.handle(
                        events.ClientSaid(action.client, messages.AskCommitted(job)), self.earlier.ctx.now_ns
                    ),
                )
                return None
            case messages.CommittedAnswer(job, snapshot=None, problem="") if core is self.current:
                if keeping := [peer.node for peer in core.peers.table.values() if _keeps(peer, job)]:
                    names = ", ".join(core.ctx.name_of(node) for node in keeping[:4])
                    text = (
                        f"it is in the epoch before {core.ctx.config.epoch} still, which this node was not in: {names}"
                    )
                    return ReplyClient(action.client, structs.replace(action.message, problem=f"{text} can read it"))
            case messages.StatusAnswer(status) if self.earlier is not None:
                return ReplyClient(action.client, messages.StatusAnswer(self._with_earlier(status)))
            case _:
                pass
        return action

    # --- how a job moves ---

    def _ask_restore(self, client: int, question: messages.AskRestore, now_ns: int) -> None:
        self._forget(client, now_ns)
        new = self.current.jobs.get(question.job)
        if self.earlier is None or (new is not None and new.job.committed is not None):
            self.questions[client] = question
            self._feed(self.current, events.ClientSaid(client, question), now_ns)
            return
        earlier = self.earlier

        def then(answer: messages.DaemonMessage) -> None:
            if isinstance(answer, messages.RestoreAnswer):
                self._ask_current(client, question, answer, earlier)

        self._ask(earlier, client, question, then)

    def _ask_current(
        self, client: int, question: messages.AskRestore, old: messages.RestoreAnswer, earlier: Node | None
    ) -> None:
        """The epoch before has answered; `earlier`: it is served here, so the job may go on in it."""
        after, passing_over = old.attempt, old.snapshot is not None

        def then(answer: messages.DaemonMessage) -> None:
            if isinstance(answer, messages.RestoreAnswer):
                self._choose(client, question, old, answer, earlier)

        again = structs.replace(question, after=after, passing_over=passing_over)
        self._ask(self.current, client, again, then)

    def _choose(
        self,
        client: int,
        question: messages.AskRestore,
        old: messages.RestoreAnswer,
        new: messages.RestoreAnswer,
        earlier: Node | None,
    ) -> None:
        if new.snapshot is not None:
            self._reply(client, new)
        elif old.problem and not question.begin_fresh:
            both = "; ".join(text for text in (old.problem, new.problem) if text)
            self._reply(client, structs.replace(new, attempt=0, problem=both))
        elif new.problem:
            self._reply(client, new)
        elif not new.complete and earlier is not None and earlier is self.earlier:
            self._ask(
                earlier,
                client,
                structs.replace(question, after=new.attempt),
                lambda answer: self._reply(client, answer),
            )
        elif old.snapshot is None:
            self._reply(client, new)
        else:
            self._reply(
                client,
                structs.replace(
                    new,
                    snapshot=old.snapshot,
                    layout=old.layout,
                    held_epoch=old.epoch,
                    held_attempt=old.attempt,
                    warning=old.warning,
                    use_older=old.use_older,
                ),
            )

    # --- a node that serves the epoch in force only ---

    def _seek(self, action: ReplyClient, question: messages.AskRestore) -> ReplyClient | None:
        """Nothing is committed in the epoch in force: perhaps another node still serves the one before."""
        answer, ctx = action.message, self.current.ctx
        assert isinstance(answer, messages.RestoreAnswer)
        behind = [peer.node for peer in self.current.peers.table.values() if peer.behind]
        if answer.earlier_at is None:
            if answer.complete or not behind or answer.problem:
                return action
            names = ", ".join(ctx.name_of(node) for node in behind)
            text = f"{names}: of another epoch than {ctx.config.epoch}, and may hold what this job restores"
            problem = f"{text}; give 'holdfast upgrade' there, with this node's config, then start the job again"
            return ReplyClient(action.client, structs.replace(answer, attempt=0, problem=problem))
        request = ctx.new_request()
        self.sought[request] = Sought(action.client, question, ctx.seconds(REMOTE_S))
        wanted = EarlierWanted(question.job, request, answer.attempt)
        self.current.peers.dial(answer.earlier_at)
        ctx.tell(answer.earlier_at, wanted)
        self._take(self.current, self.current.flush())
        return None

    def _about_earlier(self, node: int, message: EarlierWanted | EarlierGiven) -> None:
        if isinstance(message, EarlierGiven):
            sought = self.sought.pop(message.request, None)
            if sought is not None:
                old = messages.RestoreAnswer(
                    message.job,
                    message.attempt,
                    message.snapshot,
                    message.layout,
                    problem=message.problem,
                    epoch=message.epoch,
                )
                self._ask_current(sought.client, sought.question, old, None)
        elif self.earlier is not None:
            wanted = message

            def then(answer: messages.DaemonMessage) -> None:
                if isinstance(answer, messages.RestoreAnswer):
                    self._give(node, wanted, answer)

            self._ask(self.earlier, 0, messages.AskRestore(message.job, after=message.after), then)

    def _give(self, node: int, wanted: EarlierWanted, answer: messages.RestoreAnswer) -> None:
        self.current.peers.dial(node)
        self.current.ctx.tell(
            node,
            EarlierGiven(
                wanted.job,
                wanted.request,
                answer.epoch,
                answer.attempt,
                answer.snapshot,
                answer.layout,
                answer.problem,
            ),
        )
        self._take(self.current, self.current.flush())

    # --- memory, and the end ---

    def _make_way(self, core: Node, name: str, attempt: int) -> None:
        """A job plans in one epoch: what it has free in the other, of earlier attempts, goes back first."""
        if self.earlier is None:
            return
        other = self.earlier if core is self.current else self.current
        parts = other.jobs.get(name)
        if parts is None or attempt <= parts.job.attempt:
            return
        _free_spares(parts)
        if other is self.earlier and (new := core.jobs.get(name)) is not None:
            new.job.lean = any(slot.phase is not Phase.ABSENT for slot in parts.job.slots)
        self._take(other, other.flush())

    def _let_go(self, earlier: Node) -> None:
        """What the epoch before is not needed for any more goes; of what is left heartbeats tell."""
        idle_since_ns = earlier.ctx.now_ns - int(IDLE_S * 1e9)
        for name, parts in list(earlier.jobs.items()):
            new, old = self.current.jobs.get(name), parts.job
            moved = new is not None and new.job.planned and new.job.attempt > old.attempt
            if new is not None and new.job.committed is not None:
                earlier.registry.forget(name)
                new.job.lean = False
                new.job.ensure_memory()
            elif old.committed is None and (moved or (not old.planned and old.touched_ns < idle_since_ns)):
                earlier.registry.forget(name)
            elif moved:
                _free_spares(parts)
        self._take(earlier, earlier.flush())
        jobs = tuple(sorted(earlier.jobs))
        kept = [slot for name in jobs for slot in earlier.jobs[name].job.slots if slot.phase is not Phase.ABSENT]
        kept_bytes = sum(slot.sizes.total_bytes for slot in kept)
        told = EarlierReport(earlier.ctx.config.epoch, jobs, kept_bytes)
        self.current.ctx.earlier = told if jobs else UNSET
        self._take(self.current, self.current.flush())

    @property
    def is_over(self) -> bool:
        """Whether the epoch before is not needed here any more."""
        return self.earlier is not None and not self.earlier.jobs

    def end_earlier(self) -> Decided:
        """The shell closes what belongs to the epoch before; what is to be freed yet is told."""
        assert self.earlier is not None
        assert self.is_over
        earlier, self.earlier = self.earlier, None
        left = [memory for memory in earlier.arena.reserved if memory.generation <= self.current.ctx.generations_from]
        for memory in left:  # lent to readers, who are told that the snapshot was released
            earlier.arena.release(memory)
        self.current.ctx.earlier = UNSET
        for number in [number for number, asked in self.asked.items() if asked.core is earlier]:
            del self.asked[number]  # who asked asks again
        self.homes = {key: core for key, core in self.homes.items() if core is not earlier}
        return [(earlier, Free(memory)) for memory in left]

    # --- for the shell ---

    def may_commit(self) -> bool:
        """As `Node.may_commit`, of both."""
        return any(core.may_commit() for core in self.cores)

    def stop(self) -> None:
        """As `Node.stop`, of both."""
        for core in self.cores:
            core.stop()

    def is_copying(self) -> bool:
        """As `Node.is_copying`, of both."""
        return any(core.is_copying() for core in self.cores)

    def status(self) -> dict[str, object]:
        """The cluster as this node sees it."""
        return self._with_earlier(self.current.status())

    def _with_earlier(self, status: dict[str, object]) -> dict[str, object]:
        """With what this node knows of the jobs that are still in the epoch before."""
        if self.earlier is None or not self.earlier.jobs:
            return status
        old: dict[str, Any] = self.earlier.status()
        here = next(one for one in old["nodes"] if one["name"] == old["seen_by"])
        new_names = {node.name for node in self.current.ctx.config.nodes}
        row: dict[str, Any] = {
            "epoch": self.earlier.ctx.config.epoch,
            "jobs": old["jobs"],
            "here": here["jobs"],
            "leaving": [node.name for node in self.earlier.ctx.config.nodes if node.name not in new_names],
        }
        told = status.get("earlier")
        status = {**status, "earlier": {**(told if isinstance(told, dict) else {}), **row}}
        for job in old["jobs"]:
            if job["reason"]:
                text = f"epoch {row['epoch']}: job {job['name']}: {job['reason']}"
                status["reason"] = f"{status['reason']}; {text}" if status["reason"] else text
            status["verdict"] = max(str(status["verdict"]), job["verdict"], key=VERDICTS.index)
        return status


def _keeps(peer: Peer, job: str) -> bool:
    """Whether a node said that it serves the epoch before for a job."""
    told = peer.heartbeat.earlier if peer.heartbeat is not None and peer.heard_ns is not None else UNSET
    return isinstance(told, EarlierReport) and job in told.jobs


def _free_spares(parts: JobParts) -> None:
    """Slots that hold nothing are not wanted back, until there is another plan."""
    job = parts.job
    job.current = None
    for slot in job.slots:
        if slot.phase is Phase.EMPTY and not slot.reserved:
            job.free(slot)
