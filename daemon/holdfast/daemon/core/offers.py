"""Which committed snapshot a job offers to readers: the question, on its way to the collector and back.

Covers asking and answering without a restore: no attempt begins, nothing is paused. Readers of this node ask by client,
the node's own range reads by a function that is called with the answer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from holdfast.daemon.core import report
from holdfast.daemon.core.collector import Collector, Query
from holdfast.daemon.core.context import Context
from holdfast.daemon.core.peers import Peers
from holdfast.daemon.core.registry import Registry
from holdfast.protocol import limits, messages
from holdfast.protocol.exit_codes import ExitCode
from holdfast.protocol.ids import SnapshotId

LOOK_S = 0.02  # between two looks at open questions: each is at all nodes, and thousands may speak in that time
ASK_AGAIN_S = 1.0  # a question or its answer may be lost
Answer = Callable[[messages.CommittedGiven | None], None]  # None: the collector gave no answer in time


@dataclass(slots=True)
class Question:
    """One open question of this node."""

    job: str
    answer: Answer
    client: int | None
    again_ns: int
    deadline_ns: int


@dataclass(slots=True)
class Offers:
    """This node's questions, and those that it answers as collector."""

    ctx: Context
    peers: Peers
    registry: Registry
    collector: Collector
    asked: dict[int, Question] = field(default_factory=dict)
    hearing: set[tuple[int, int]] = field(default_factory=set)  # those for which all nodes were asked to speak
    to_answer: dict[tuple[int, int], Query] = field(default_factory=dict)  # (asker, request) -> question
    look_ns: int = 0  # when a heartbeat is worth a look at them again

    def ask_for(self, client: int, job: str) -> None:
        """A reader of this node wants to know."""

        def answer(given: messages.CommittedGiven | None) -> None:
            if given is None:
                text = f"no collector answers: {self.ctx.name_of(self.peers.collector)} is asked; see 'holdfast status'"
                self.ctx.reply(client, messages.Denied("AskCommitted", job, ExitCode.UNREACHABLE, text, retry=True))
                return
            said = messages.CommittedAnswer(job, given.attempt, given.snapshot, given.layout, given.problem)
            self.ctx.reply(client, said)

        self.ask(job, answer, client=client)

    def ask(self, job: str, answer: Answer, *, client: int | None = None) -> None:
        """Ask the collector; `answer` is called once."""
        if len(self.asked) >= limits.CLIENT_COUNT_MAX:
            answer(None)
            return
        request = self.ctx.new_request()
        deadline_ns = self.ctx.seconds(2 * limits.HEAR_ALL_S + limits.JOIN_S)
        self.asked[request] = Question(job, answer, client, self.ctx.now_ns, deadline_ns)
        self._send(request)

    def _send(self, request: int) -> None:
        question = self.asked[request]
        if not self.peers.settled:
            return  # who collects is not known yet
        question.again_ns = self.ctx.seconds(ASK_AGAIN_S)
        target = self.peers.collector
        if target == self.ctx.node:
            self.wanted(self.ctx.node, messages.CommittedWanted(question.job, request))
        else:
            self.ctx.tell(target, messages.CommittedWanted(question.job, request))

    def wanted(self, asker: int, said: messages.CommittedWanted) -> None:
        """A node asks this one, which collects."""
        if len(self.to_answer) < limits.CLIENT_COUNT_MAX:
            query = Query(said.job, said.request, asker, self.ctx.now_ns, self.ctx.seconds(limits.HEAR_ALL_S))
            self._answer({(asker, said.request): self.to_answer.setdefault((asker, said.request), query)})

    def heard(self) -> None:
        """A node said what it holds: some questions may have waited for it. One look serves many heartbeats."""
        if self.to_answer and self.ctx.now_ns >= self.look_ns:
            self.look_ns = self.ctx.seconds(LOOK_S)
            self._answer(self.to_answer)

    def _answer(self, questions: Mapping[tuple[int, int], Query]) -> None:
        """Answer what can be answered."""
        for key, query in list(questions.items()):
            if not self.peers.settled and self.ctx.now_ns < query.deadline_ns:
                continue
            parts = self.registry.get(query.job)
            own = (
                report.job_report(parts.job, parts.rebuild, parts.healing.drill.shown()) if parts is not None else None
            )
            decided = self.collector.decide(query, parts.job if parts is not None else None, own)
            if decided is None:
                continue  # a layout is being fetched
            doubtful = decided.problem or decided.snapshot != self._newest_committed(query.job, own)
            if doubtful and self.ctx.now_ns < query.deadline_ns and not self._heard_since(query.started_ns):
                if key not in self.hearing:  # what they hold now may be more than their last heartbeats say
                    self.hearing.add(key)
                    self.ctx.tell_all(messages.ReportWanted(query.request))
                continue
            self.hearing.discard(key)
            del self.to_answer[key]
            given = messages.CommittedGiven(
                job=decided.job,
                request=decided.request,
                attempt=max(decided.attempt - 1, 0),
                snapshot=decided.snapshot,
                layout=decided.layout,
                problem=decided.problem,
            )
            if query.asker == self.ctx.node:
                self.given(given)
            else:
                self.ctx.tell(query.asker, given)

    def _newest_committed(self, job: str, own: messages.JobReport | None) -> SnapshotId | None:
        """The newest snapshot that any node knows to be committed; an older one is offered only if all confirm it."""
        reports = [*self.peers.reports(job).values(), *([] if own is None else [own])]
        return max((seen.committed for seen in reports if seen.committed is not None), default=None)

    def _heard_since(self, since_ns: int) -> bool:
        return all(peer.heartbeat_ns >= since_ns for node, peer in self.peers.table.items() if self.peers.alive(node))

    def given(self, said: messages.CommittedGiven) -> None:
        """The collector's answer."""
        question = self.asked.get(said.request)
        if question is not None and question.job == said.job:
            del self.asked[said.request]
            question.answer(said)

    def client_gone(self, client: int) -> None:
        """Forget the questions of a process that ended."""
        self.asked = {request: question for request, question in self.asked.items() if question.client != client}

    def tick(self) -> None:
        """Deadlines, and questions that are asked again."""
        self._answer(self.to_answer)
        for request, question in list(self.asked.items()):
            if self.ctx.now_ns >= question.deadline_ns:
                del self.asked[request]
                question.answer(None)
            elif self.ctx.now_ns >= question.again_ns:
                self._send(request)

    def check(self) -> None:
        """Assert: nodes are asked to speak only for questions that are open."""
        assert self.hearing <= self.to_answer.keys()
