"""What the ranks of a job tell each other at a plan or a restore, and whether they agree."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
from holdfast.client.durable_places import choose
from holdfast.client.errors import RanksDisagreeError
from holdfast.client.ranks import Ranks
from holdfast.client.replicas import Claim
from holdfast.client.session import RankPlan
from holdfast.client.shard import ShardLayout
from holdfast.protocol import limits
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.layout import ShardPlace
from holdfast.protocol.messages import RestoreAnswer, Welcome


@dataclass(frozen=True, slots=True)
class Proposal:
    """A plan on which all ranks agree, and this rank's memory for it, which is being made."""

    plan: RankPlan
    layout: ShardLayout
    ready: "Future[None]"


Places = tuple[tuple[int, int], ...]  # (epoch, index of the rank's node in its list), of each that its daemon serves


def places_of(welcome: Welcome) -> Places:
    """Where a rank is that talks to this daemon."""
    earlier = ((welcome.earlier_epoch, welcome.earlier_node),) if welcome.earlier_epoch else ()
    return ((welcome.epoch, welcome.node), *earlier)


def shard_places(ranks: Sequence[tuple[Places, int]], epoch: int) -> tuple[tuple[ShardPlace, ...], str]:
    """Who stages how much, as the list of an epoch counts.

    Args:
        ranks: where each is, and the bytes of its shard.
        epoch: in which the attempt began; 0: of a daemon that does not tell.

    Returns:
        The places, and why the ranks can't plan together; empty if they can.
    """
    found = [dict(places).get(epoch or places[0][0]) if places else None for places, _ in ranks]
    away = [rank for rank, node in enumerate(found) if node is None]
    if away:
        others = sorted({known for rank in away for known, _ in ranks[rank][0]})
        text = f"the job's attempt began in epoch {epoch}, the nodes of ranks {away[:8]} are in {others or 'none'}"
        hint = "give 'holdfast upgrade' there with the config of that epoch, or start the job again"
        return (), f"{text}: {hint}"
    return tuple(ShardPlace(node or 0, size) for node, (_, size) in zip(found, ranks, strict=True)), ""


class Part(msgspec.Struct):
    """What one rank tells the others at a plan or a restore."""

    job: str
    places: Places = ()
    shard_bytes: int = 0
    every: int = 1
    version: int = 0
    step: int = 0
    problem: str = ""
    attempt: int = 0
    epoch: int = 0  # in which the attempt began
    held_epoch: int = 0  # in which the snapshot was staged
    held_attempt: int = 0  # that began there
    snapshot: SnapshotId | None = None
    settled: bool = False  # its optimizers have their state: the layout of the first snapshot is known
    nodes: tuple[int, ...] = ()  # of the snapshot's roles
    kind: Literal["plan", "restore", "done"] = "plan"
    fatal: bool = False  # something is committed and can't be had
    copies: tuple[tuple[str, int], ...] = ()  # durable copies that are restored instead, and their steps; best first
    claims: tuple[Claim, ...] = ()  # what others must have alike

    def take(self, answer: RestoreAnswer) -> None:
        """Pass on what the cluster answered to role 0."""
        self.attempt, self.snapshot, self.epoch = answer.attempt, answer.snapshot, answer.epoch
        self.held_epoch, self.held_attempt = answer.held_epoch or answer.epoch, answer.held_attempt or answer.attempt
        self.nodes = tuple(place.node for place in answer.layout.shards) if answer.layout is not None else ()
        self.problem, self.fatal = answer.problem, bool(answer.problem)

    def lies_here(self, role: int, world_size: int, places: Places) -> bool:
        """Whether role's shard of the snapshot is held by the daemon of a rank that is at these places."""
        if len(self.nodes) != world_size or not places:
            return False
        return dict(places).get(self.held_epoch or places[0][0]) == self.nodes[role]

    def offer(self, answer: RestoreAnswer) -> str:
        """Name the durable copies that may be restored instead of what the cluster found in memory, if there are any.

        Returns:
            What is to be said: a job must not begin from nothing only because its copies can't be seen from here.
        """
        try:
            chosen = choose(answer)
        except OSError as error:
            if answer.snapshot is not None and not answer.problem:
                return f"the durable copies, of which an older one was to be tried, can't be read: {error}"
            self.problem = f"{self.problem or 'memory holds nothing'}; durable copies can't be read either: {error}"
            self.fatal = True
            return ""
        if chosen:
            self.copies = tuple((copy.place, copy.step) for copy in chosen)
        elif answer.problem and answer.durable_dir:
            self.problem += f"; {answer.durable_dir} has no durable copy of the job either"
        elif answer.snapshot is None and answer.durable_dir.startswith("/") and not Path(answer.durable_dir).is_dir():
            return (
                f"memory holds nothing of job {self.job}, and {answer.durable_dir} (durable.dir) is no directory on "
                "rank 0's host: if copies of the job exist, mount it there and start again; else nothing is wrong"
            )
        return ""


def exchange(ranks: Ranks, part: Part, kind: Literal["plan", "restore", "done"]) -> list[Part]:
    """Every rank's part, by rank. A collective.

    Raises:
        RanksDisagreeError: another rank is somewhere else in its program.
    """
    part.kind = kind
    part.problem = part.problem[: limits.TEXT_CHARS_MAX]
    parts = [msgspec.msgpack.decode(raw, type=Part) for raw in ranks.exchange(msgspec.msgpack.encode(part))]
    for rank, other in enumerate(parts):
        if other.job != part.job or other.kind != kind:
            raise RanksDisagreeError(
                f"rank {ranks.rank} is at {kind} of job {part.job!r}, rank {rank} at {other.kind} of job "
                f"{other.job!r}; all ranks must make the same Snapshotter and call it in the same order"
            )
    return parts


def disagreement(parts: list[Part]) -> str:
    """Why the ranks can't go on together; empty if they can."""
    problems = [f"rank {rank}: {part.problem}" for rank, part in enumerate(parts) if part.problem]
    if problems:
        return "; ".join(problems[:4])
    for rank, part in enumerate(parts):
        if part.every != parts[0].every or part.step != parts[0].step:
            return (
                f"rank {rank} stages every {part.every} steps from step {part.step} on, rank 0 every {parts[0].every} "
                f"from step {parts[0].step} on; all ranks must agree"
            )
    return ""
