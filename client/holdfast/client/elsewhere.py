"""A Snapshotter's way to state that lies elsewhere, or lay otherwise, when its own node's shard is not the answer.

Keeps torch's checkpoints, which take a while to import, out of every restore that does not need them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from holdfast.client.addresses import Address
from holdfast.client.agreement import Part, exchange
from holdfast.client.durable_places import damage_of
from holdfast.client.errors import HoldfastError, NotRecoverableError, RefusedError
from holdfast.client.ranks import Ranks
from holdfast.client.state_errors import MalformedShardError, RestoreMismatchError, ShardError
from holdfast.protocol.ids import SnapshotId

PATIENCE_S = 120.0  # for one answer; a range of a lost node is computed from what the others hold


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """One rank's live state, and where it asks.

    Attributes:
        state: what the Snapshotter was given.
        job: its name.
        socket: of this rank's daemon.
        lenient: whether replicas that differed when they were staged are said instead of refused.
    """

    state: Mapping[str, object]
    job: str
    socket: Address
    ranks: Ranks
    allow_pickle: bool
    lenient: bool = False

    def restore(self, snapshot: SnapshotId, *, say: Callable[[str], None]) -> Exception | None:
        """Restore by ranges of all ranks' shards. Returns what went wrong; `say` hears what is not as it was."""
        from holdfast.client.dcp_reader import HoldfastReader  # noqa: PLC0415  # see the file's head
        from holdfast.client.resharding import reshard_into  # noqa: PLC0415

        try:
            reader = HoldfastReader(
                job=self.job, socket=self.socket, timeout_s=PATIENCE_S, allow_pickle=self.allow_pickle
            )
            role, world_size = self.ranks.rank, self.ranks.world_size
            told = reshard_into(
                self.state, reader, snapshot=snapshot, role=role, world_size=world_size, lenient=self.lenient
            )
        except RefusedError as error:
            return NotRecoverableError(str(error))
        except (HoldfastError, ShardError) as error:
            return error
        for text in told:
            say(text)
        return None

    def restore_copies(self, copies: Sequence[tuple[str, int]], *, say: Callable[[str], None]) -> tuple[str, int]:
        """Restore from the first of these durable copies that every rank can read. A collective.

        Returns:
            The copy and its step.

        Raises:
            RestoreMismatchError: a copy is whole, and the live state does not fit it.
            NotRecoverableError: none can be read.
        """
        told = []
        for directory, step in copies:
            problem = self._agree(self._damage(directory)) or self._agree(self._restore_copy(directory))
            if not problem:
                return directory, step
            told.append(f"the durable copy of step {step} in {directory} can't be restored: {problem}")
            say(told[-1])
        raise NotRecoverableError("; ".join(told[:4]))

    def _agree(self, failure: Exception | None) -> str:
        """What went wrong on any rank; empty if nothing did. All ranks hear the same, and so do the same.

        Raises:
            RestoreMismatchError: the live state of a rank does not fit; an older copy would not either.
        """
        unfit = isinstance(failure, RestoreMismatchError)
        mine = Part(self.job, problem=str(failure) if failure else "", fatal=unfit)
        parts = exchange(self.ranks, mine, "done")
        text = "; ".join([f"rank {rank}: {part.problem}" for rank, part in enumerate(parts) if part.problem][:4])
        if any(part.fatal for part in parts):
            raise failure if unfit and failure is not None else RestoreMismatchError(text)
        return text

    def _damage(self, directory: str) -> Exception | None:
        """What is wrong with this rank's share of a copy, before anything live is changed."""
        found = damage_of(directory, part=self.ranks.rank, parts=self.ranks.world_size)
        return MalformedShardError(found) if found else None

    def _restore_copy(self, directory: str) -> Exception | None:
        from holdfast.client.durable import load_copy  # noqa: PLC0415  # see the file's head

        try:
            load_copy(self.state, directory, allow_pickle=self.allow_pickle)
        except ShardError as error:
            return NotRecoverableError(str(error)) if isinstance(error, MalformedShardError) else error
        return None
