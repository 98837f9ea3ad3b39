"""What commands ask: the cluster's status, and the rebuild of what was lost."""

from dataclasses import dataclass, field

from holdfast.daemon.core.context import Context
from holdfast.daemon.core.peers import Peers
from holdfast.daemon.core.registry import Registry
from holdfast.protocol import limits, messages
from holdfast.protocol.exit_codes import ExitCode
from holdfast.protocol.health import DrillAsked


@dataclass(slots=True)
class Asks:
    """Open questions of commands."""

    ctx: Context
    peers: Peers
    registry: Registry
    waiting: dict[int, tuple[int, int, int]] = field(default_factory=dict)  # request -> (client, deadline_ns, asked)

    def status(self, client: int) -> None:
        """Ask the collector, which hears every node."""
        target = self.peers.collector
        if target == self.ctx.node or len(self.waiting) >= limits.CLIENT_COUNT_MAX:
            self.ctx.reply(client, messages.StatusAnswer(self.registry.told_status()))
            return
        request = self.ctx.new_request()
        self.waiting[request] = (client, self.ctx.seconds(limits.HEARTBEAT_S * 2), target)
        self.ctx.tell(target, messages.StatusWanted(request))

    def status_given(self, request: int, status: dict[str, object]) -> None:
        """The collector's answer."""
        asked = self.waiting.pop(request, None)
        if asked is not None:
            self.ctx.reply(asked[0], messages.StatusAnswer(status))

    def client_gone(self, client: int) -> None:
        """Forget the questions of a command that ended."""
        self.waiting = {request: asked for request, asked in self.waiting.items() if asked[0] != client}

    def tick(self) -> None:
        """Deadlines."""
        for request, (client, deadline_ns, target) in list(self.waiting.items()):
            if not self.peers.alive(target):  # it died while it was asked: who wants to know is to hear of that soon
                del self.waiting[request]
                self.status(client)
            elif self.ctx.now_ns >= deadline_ns:  # the collector is silent: better the own view than none
                del self.waiting[request]
                self.ctx.reply(client, messages.StatusAnswer(self.registry.told_status()))

    def drill(self, client: int, stripes: int) -> None:
        """An operator asks that all nodes drill now."""
        started = any(parts.healing.repair.slot() is not None for parts in self.registry)
        self.drill_here(stripes, pass_on=True)
        text = "all nodes drill" if started else "no committed snapshot is held here; the others drill"
        self.ctx.reply(client, messages.DrillAnswer(text))

    def drill_here(self, stripes: int, *, pass_on: bool) -> None:
        """Drill, and have the collector tell all others, who drill as well."""
        for parts in self.registry:
            parts.healing.drill.start(stripes)
        if not pass_on:
            return
        if self.peers.collector == self.ctx.node:
            self.ctx.tell_all(DrillAsked(stripes, pass_on=False))
        else:
            self.ctx.tell(self.peers.collector, DrillAsked(stripes, pass_on=True))

    def recover(self, client: int, name: str | None) -> None:
        """An operator asks that one node, or all that lost something, be rebuilt."""
        names = [node.name for node in self.ctx.config.nodes]
        if name is not None and name not in names:
            text = f"no node is named {name!r}; this cluster has {', '.join(names)}"
            self.ctx.reply(client, messages.Denied("AskRecover", "", ExitCode.USAGE, text))
            return
        targets = [names.index(name)] if name is not None else range(len(names))
        for target in targets:  # all of them: what is known here of the others' losses may be a heartbeat old
            self.rebuild(target)
        started = [target for target in targets if self._loses(target)]
        text = f"rebuilding on {len(started)} nodes" if started else "nothing lost is known here"
        self.ctx.reply(client, messages.RecoverAnswer(tuple(names[target] for target in started), text))

    def _loses(self, node: int) -> bool:
        if node == self.ctx.node:
            return any(parts.job.lost_bytes for parts in self.registry)
        beat = self.peers.table[node].heartbeat if self.peers.alive(node) else None
        return beat is not None and any(job_report.lost_bytes for job_report in beat.jobs)

    def rebuild(self, target: int) -> None:
        """Start a rebuild here, or pass the wish on to the node that should."""
        if target == self.ctx.node:
            for parts in self.registry:
                if parts.job.lost_bytes and (problem := parts.rebuild.start()):
                    self.ctx.log(f"job {parts.job.name}: no rebuild: {problem}", "warning")
        elif target in self.ctx.dialled:
            self.ctx.tell(target, messages.RebuildAsked(target))
        else:
            self.ctx.tell(self.peers.collector, messages.RebuildAsked(target))
