"""What this host's trainers and commands say, and which part of the core hears it."""

from dataclasses import dataclass

from holdfast.daemon.core.asks import Asks
from holdfast.daemon.core.collector import Collector
from holdfast.daemon.core.context import Context
from holdfast.daemon.core.offers import Offers
from holdfast.daemon.core.ranges import Ranges
from holdfast.daemon.core.registry import Registry
from holdfast.daemon.core.restoring import Restoring
from holdfast.daemon.core.trace_asks import TraceAsks
from holdfast.protocol import limits, messages
from holdfast.protocol.exit_codes import ExitCode
from holdfast.protocol.trace import AskTrace


@dataclass(slots=True)
class ClientSide:
    """The ear for this host."""

    ctx: Context
    registry: Registry
    collector: Collector
    restoring: Restoring
    asks: Asks
    offers: Offers
    ranges: Ranges
    trace_asks: TraceAsks

    def said(self, client: int, message: messages.ClientMessage) -> None:
        """A trainer or command of this host said something."""
        match message:
            case messages.AskRestore():
                self.restoring.ask(client, message)
            case messages.AskStatus():
                self.asks.status(client)
            case messages.AskRecover(node):
                self.asks.recover(client, node)
            case messages.AskCommitted(job):
                self.offers.ask_for(client, job)
            case messages.ReadRange():
                self.ranges.read(client, message)
            case messages.CloseRange(request):
                self.ranges.close(client, request)
            case messages.AskDrill(stripes):
                self.asks.drill(client, stripes)
            case AskTrace():
                self.trace_asks.ask(client, message)
            case messages.AskForget(job):
                attempt = known.job.attempt if (known := self.registry.get(job)) is not None else 0
                found = self.registry.forget(job)
                if found:
                    self.ctx.tell_all(messages.JobForgotten(job, attempt))
                self.ctx.reply(client, messages.ForgetAnswer(job, found))
            case messages.Plan(job):
                parts = self.registry.obtain(job)
                if parts is None:
                    text = f"{limits.JOB_COUNT_MAX} jobs are the limit; free one with 'holdfast forget JOB'"
                    self.ctx.reply(client, messages.Denied("Plan", job, ExitCode.OVER_BUDGET, text))
                else:
                    self.registry.make_room(parts.job, message)
                    parts.job.plan(client, message)
            case _:
                self._about_job(client, message)

    def _about_job(self, client: int, message: messages.ClientMessage) -> None:
        parts = self.registry.get(getattr(message, "job", ""))
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
                parts.job.openings.begin(client, message)
            case messages.Seal():
                parts.protect.seal(client, message)
                self.collector.consider(parts.job)
            case messages.Skip(_, snapshot, role, reason):
                parts.job.wrote(client)
                if parts.job.roles.get(role) == client:
                    parts.job.give_up_snapshot(snapshot, f"rank {role}: {reason}")
                parts.job.grant_waiting()
            case messages.OpenShard():
                parts.shards.open(client, message)
            case messages.CloseShard():
                parts.job.touched_ns = self.ctx.now_ns
            case messages.Leave(_, role):
                if parts.job.roles.get(role) == client:
                    parts.job.leave(role)
            case _:
                raise AssertionError(f"no rule for {type(message).__name__}")
