"""A job's question what to restore, on its way from a rank to the collector and back.

Covers the conversation. What is decided, and from what, is in `Collector`.
"""

from dataclasses import dataclass, field

import msgspec
from holdfast.daemon.core import report
from holdfast.daemon.core.collector import Collector
from holdfast.daemon.core.context import Context
from holdfast.daemon.core.peers import Peers
from holdfast.daemon.core.record import Records
from holdfast.daemon.core.registry import Registry
from holdfast.protocol import limits, messages


@dataclass(slots=True)
class Restoring:
    """The questions of this node's ranks, and those that this node answers as collector."""

    ctx: Context
    peers: Peers
    registry: Registry
    collector: Collector
    records: Records
    asking: dict[int, tuple[int, messages.AskRestore]] = field(default_factory=dict)  # request -> (client, question)
    unsent: list[tuple[int, messages.AskRestore]] = field(default_factory=list)  # wait until a collector is known

    def ask(self, client: int, question: messages.AskRestore) -> None:
        """Role 0 of a job wants to know what to restore: ask the collector."""
        if not self.peers.settled:
            self.unsent.append((client, question))
            return
        # A rank that asks again takes only the answer to its last question: each decision begins another attempt.
        self.asking = {r: (c, q) for r, (c, q) in self.asking.items() if (c, q.job) != (client, question.job)}
        request = self.ctx.new_request()
        self.asking[request] = (client, question)
        target = self.peers.collector
        if target == self.ctx.node:
            self.asked(self._asked(question, request), self.ctx.node)
        else:
            self.ctx.tell(target, self._asked(question, request))

    @staticmethod
    def _asked(question: messages.AskRestore, request: int) -> messages.RestoreAsked:
        return messages.RestoreAsked(question.job, request, question.begin_fresh, question.after, question.passing_over)

    def asked(self, said: messages.RestoreAsked, asker: int) -> None:
        """A rank of some node wants to know, and this node collects."""
        query = self.collector.ask(said, asker)
        if query is not None:
            self.registry.pause_commits(said.job, (self.ctx.node, query.number))

    def tick(self) -> None:
        """Answer what can be answered; send on what waited for a collector."""
        self.answer()
        self.collector.tell_again()
        for client, question in self.unsent[:]:
            if self.peers.settled:
                self.unsent.remove((client, question))
                self.ask(client, question)

    def client_gone(self, client: int) -> None:
        """Forget the questions of a process that ended."""
        self.unsent = [(c, question) for c, question in self.unsent if c != client]
        self.asking = {r: (c, question) for r, (c, question) in self.asking.items() if c != client}

    def answer(self) -> None:
        """Decide the questions for which all live nodes were heard."""
        for query in self.collector.queries[:]:
            if not self.collector.ready(query):
                continue
            parts = self.registry.get(query.job)
            own = (
                report.job_report(parts.job, parts.rebuild, parts.healing.drill.shown()) if parts is not None else None
            )
            over = self.registry.forgotten.get(query.job, 0)  # word of its attempts may still be on its way
            job, unheard = parts.job if parts else None, self.collector.unheard(query)
            decided = self.collector.decide(query, job, own, attempts_over=over, unheard=unheard, paused=True)
            if decided is None:
                continue
            self.collector.queries.remove(query)
            decided = msgspec.structs.replace(
                decided,
                asker=query.asker,
                number=query.number,
                complete=self.collector.complete(),
                earlier_at=self.collector.earlier_at(query.job),
            )
            self.ctx.tell_all(decided)
            self.decided(decided, self.ctx.node)

    def decided(self, decided: messages.RestoreDecided, by: int) -> None:
        """The collector has decided: begin the attempt here, and answer the rank if it asked here.

        `by`: the collector; if it is this node, it knows what it refused and how long it heard.
        """
        here = by == self.ctx.node
        if self.registry.is_forgotten(decided.job, decided.attempt) and not decided.problem:
            return
        if decided.problem:
            self.registry.resume_commits(decided.job, (by, decided.number))
        else:
            parts = self.registry.obtain(decided.job)
            if parts is not None:
                if decided.asker is not None and not here:
                    self.collector.answered_elsewhere(decided.job, decided.asker, decided.request)
                layout_id = parts.job.learn_layout(decided.layout) if decided.layout is not None else None
                parts.job.begin_attempt(decided.attempt, decided.snapshot)
                if parts.job.committed == decided.snapshot:
                    parts.job.committed_layout_id = layout_id
                if decided.snapshot is not None and parts.job.attempt == decided.attempt:
                    self.records.decided(
                        parts,
                        decided.snapshot,
                        heard=here,
                        refused=self.collector.refused.get(decided.job, ()) if here else (),
                        heard_s=self.collector.heard_s.get(decided.job, 0.0) if here else 0.0,
                    )
        if decided.asker not in {None, self.ctx.node}:
            return
        if decided.request not in self.asking or self.asking[decided.request][1].job != decided.job:
            return
        client, question = self.asking.pop(decided.request)
        fresh = question.begin_fresh
        lives = 0 if fresh else self._lives(decided)
        limit = self.ctx.config.durable_after_lives
        self.ctx.reply(
            client,
            messages.RestoreAnswer(
                job=decided.job,
                attempt=decided.attempt,
                snapshot=None if fresh else decided.snapshot,
                layout=None if fresh else decided.layout,
                problem=decided.problem,
                warning=self._repetition(decided, lives),
                durable_dir=self.ctx.config.durable_dir or "",
                use_older=0 < limit < lives,
                epoch=self.ctx.config.epoch,
                complete=decided.complete,
                earlier_at=decided.earlier_at,
            ),
        )

    def check(self) -> None:
        """Assert: a rank waits for the answer to one question of a job."""
        assert len({(client, question.job) for client, question in self.asking.values()}) == len(self.asking)

    @staticmethod
    def _lives(decided: messages.RestoreDecided) -> int:
        """How many lives have begun from the chosen step, this one included; 0 if that is not known.

        Each life has an attempt of its own and a commit carries the attempt that made it: their distance counts the
        lives that began from this step, whoever collects. An attempt that was numbered by the time counts nothing.
        """
        lives = decided.attempt - decided.snapshot.attempt if decided.snapshot is not None else 0
        return lives if lives <= limits.RESTORES_COUNT_MAX else 0

    def _repetition(self, decided: messages.RestoreDecided, lives: int) -> str:
        """What to say of a job that comes back for the same step again and again: the step itself may be at fault."""
        if lives < limits.RESTORES_TOLD_COUNT:
            return ""
        text = (
            f"job {decided.job}: life {lives} begins from {decided.snapshot} and none before it has committed a newer "
            f"step; if the step itself is at fault, give it up with 'holdfast forget {decided.job}' and begin from an "
            "older or durable copy; durable.after_lives does so by itself"
        )
        self.ctx.log(text, "warning")
        return text
