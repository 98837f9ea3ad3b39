"""A Snapshotter's way to state that lies elsewhere, or lay otherwise, when its own node's shard is not the answer.

Keeps torch's checkpoints, which take a while to import, out of every restore that does not need them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from holdfast.client.errors import HoldfastError, NotRecoverableError, RefusedError
from holdfast.client.ranks import Ranks
from holdfast.client.state_errors import MalformedShardError, ShardError
from holdfast.protocol.ids import SnapshotId

PATIENCE_S = 120.0  # for one answer; a range of a lost node is computed from what the others hold


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """One rank's live state, and where it asks.

    Attributes:
        state: what the Snapshotter was given.
        job: its name.
        socket: of this rank's daemon.
    """

    state: Mapping[str, object]
    job: str
    socket: Path
    ranks: Ranks
    allow_pickle: bool

    def restore(self, snapshot: SnapshotId, *, say: Callable[[str], None]) -> Exception | None:
        """Restore by ranges of all ranks' shards. Returns what went wrong; `say` hears what is not as it was."""
        from holdfast.client.dcp_reader import HoldfastReader  # noqa: PLC0415  # see the file's head
        from holdfast.client.resharding import reshard_into  # noqa: PLC0415

        try:
            reader = HoldfastReader(
                job=self.job, socket=self.socket, timeout_s=PATIENCE_S, allow_pickle=self.allow_pickle
            )
            role, world_size = self.ranks.rank, self.ranks.world_size
            told = reshard_into(self.state, reader, snapshot=snapshot, role=role, world_size=world_size)
        except RefusedError as error:
            return NotRecoverableError(str(error))
        except (HoldfastError, ShardError) as error:
            return error
        for text in told:
            say(text)
        return None

    def restore_copy(self, directory: str) -> Exception | None:
        """Restore from a durable copy. Returns what went wrong."""
        from holdfast.client.durable import load_copy  # noqa: PLC0415  # see the file's head

        try:
            load_copy(self.state, Path(directory), allow_pickle=self.allow_pickle)
        except ShardError as error:
            return NotRecoverableError(str(error)) if isinstance(error, MalformedShardError) else error
        return None
