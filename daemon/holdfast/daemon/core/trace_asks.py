"""Questions for what a node remembers, on their way to that node and back.

A node is asked directly where this one talks to it, else by the collector, which hears every node. The answer tells
the other's clock, and between which moments of this one's it was read: so whoever asked can lay one over the other.
"""

from dataclasses import dataclass, field

from holdfast.daemon.core.context import Context
from holdfast.daemon.core.peers import Peers
from holdfast.daemon.core.trace import Trace
from holdfast.protocol import limits
from holdfast.protocol.trace import AskTrace, TraceAnswer, TraceGiven, TraceWanted


@dataclass(frozen=True, slots=True)
class _Question:
    """Whom the answer is for: a client of this node, or another node."""

    asker: int
    request: int
    of: int  # the node that is asked
    asked_ns: int
    passed_on: bool  # the asker is a node


@dataclass(slots=True)
class TraceAsks:
    """Open questions."""

    ctx: Context
    peers: Peers
    trace: Trace
    waiting: dict[int, _Question] = field(default_factory=dict)  # by the number under which it was passed on

    def ask(self, client: int, ask: AskTrace) -> None:
        """A command asks."""
        question = _Question(client, ask.request, ask.node, self.ctx.now_ns, passed_on=False)
        if ask.node == self.ctx.node:
            self._answer(question, TraceGiven(0, ask.node, self.trace.told(ask.newest)))
        else:
            self._pass_on(question, ask.newest)

    def wanted(self, asker: int, wanted: TraceWanted) -> None:
        """Another node asks, for itself or for one that it does not talk to."""
        question = _Question(asker, wanted.request, wanted.node, self.ctx.now_ns, passed_on=True)
        if wanted.node == self.ctx.node:
            self._answer(question, TraceGiven(0, wanted.node, self.trace.told(wanted.newest)))
        elif self.peers.collector == self.ctx.node:
            self._pass_on(question, wanted.newest)
        else:
            self._refuse(question, f"{self.ctx.name_of(self.ctx.node)} does not collect and can't ask for others")

    def given(self, given: TraceGiven) -> None:
        """An answer arrived."""
        question = self.waiting.get(given.request)
        if question is not None and question.of == given.node:
            del self.waiting[given.request]
            self._answer(question, given)

    def client_gone(self, client: int) -> None:
        """Forget the questions of a command that ended."""
        self.waiting = {r: q for r, q in self.waiting.items() if q.passed_on or q.asker != client}

    def tick(self) -> None:
        """Deadlines."""
        due_ns = self.ctx.now_ns - int(limits.TRACE_PATIENCE_S * 1e9)
        for request, question in list(self.waiting.items()):
            if question.asked_ns <= due_ns:
                del self.waiting[request]
                self._refuse(question, f"no answer within {limits.TRACE_PATIENCE_S} s")

    def _pass_on(self, question: _Question, newest: int) -> None:
        node = question.of
        if node >= len(self.ctx.config.nodes):
            self._refuse(question, f"this cluster has {len(self.ctx.config.nodes)} nodes")
            return
        direct = node in self.ctx.dialled and self.peers.alive(node)
        target = node if direct else self.peers.collector
        if target in {self.ctx.node, question.asker if question.passed_on else None}:
            self._refuse(question, "nothing is heard from it")
        elif len(self.waiting) >= limits.TRACE_ASKS_COUNT_MAX:
            self._refuse(question, f"{limits.TRACE_ASKS_COUNT_MAX} traces are asked for already; try again")
        else:
            request = self.ctx.new_request()
            self.waiting[request] = question
            self.ctx.tell(target, TraceWanted(request, node, newest))

    def _refuse(self, question: _Question, problem: str) -> None:
        self._answer(question, TraceGiven(0, question.of, None, problem))

    def _answer(self, question: _Question, given: TraceGiven) -> None:
        if question.passed_on:
            answer = TraceGiven(question.request, question.of, given.trace, given.problem)
            self.ctx.tell(question.asker, answer)
        else:
            asked_ns, heard_ns = question.asked_ns, self.ctx.now_ns
            self.ctx.reply(
                question.asker,
                TraceAnswer(question.request, question.of, given.trace, asked_ns, heard_ns, given.problem),
            )
