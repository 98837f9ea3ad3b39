"""A restoring rank's own shard: from its node's memory into the live state, and what lies with other ranks after it.

Covers one rank's part of a restore into the layout that staged the snapshot. Who restores what, and that all ranks do,
is the Snapshotter's.
"""

import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from holdfast.client.checks import Checks
from holdfast.client.errors import HoldfastError, NotRecoverableError, RefusedError
from holdfast.client.inward import as_payload
from holdfast.client.laps import Laps
from holdfast.client.pooling import Pooling
from holdfast.client.ranks import Ranks
from holdfast.client.replicas import Claim, layout_claims
from holdfast.client.restore import Restoring, gpu_of
from holdfast.client.stager import Stager
from holdfast.client.state_errors import RottenShardError, ShardError
from holdfast.client.witnesses import acceptance, refusal
from holdfast.protocol import messages
from holdfast.protocol.ids import SnapshotId

log = logging.getLogger("holdfast")

RESTORE_PATIENCE_S = 120.0  # a rebuild that shows no progress for so long has failed


@dataclass(frozen=True, slots=True)
class _Halfway:
    """A shard of which everything is in the live state but what lies with other ranks."""

    restoring: Restoring
    opened: messages.ShardOpened


@dataclass(slots=True)
class OwnShard:
    """One restore of this rank's shard of `job`.

    Attributes:
        state: what the Snapshotter was given.
        clock: is told of each phase.
    """

    state: Mapping[str, object]
    job: str
    ranks: Ranks
    stager: Stager
    clock: Laps
    allow_pickle: bool
    _halfway: _Halfway | None = field(default=None, init=False)

    def bring(self, snapshot: SnapshotId, attempt: int, epoch: int = 0) -> Exception | None:
        """Bring what lies here into the live state; returns what went wrong. All of it, where `claims` is empty then.

        Digests are compared here, just before use; where one is wrong the daemon is asked to repair it, once. `attempt`
        is the one that began in `epoch`, in which the snapshot was staged.
        """
        left = ""
        try:
            try:
                self._bring(snapshot, attempt, epoch, verify=False)
            except RottenShardError as error:
                left = "; the live state may be overwritten in part: build it anew"
                log.warning("rank %d: %s; the daemon is asked to repair it", self.ranks.rank, error)
                self._bring(snapshot, attempt, epoch, verify=True)
        except RefusedError as error:
            return NotRecoverableError(f"{error}{left}")
        except (HoldfastError, ShardError) as error:
            return error
        return None

    def claims(self) -> tuple[Claim, ...]:
        """What the other ranks must have in common with this one for `complete`; empty where it lacks nothing."""
        return () if self._halfway is None else layout_claims(self._halfway.restoring.parsed.manifest)

    def complete(self, *, lenient: bool, say: Callable[[str], None]) -> Exception | None:
        """Get from the other ranks what lies with them, and end the restore. A collective among all that have claims.

        Args:
            lenient: whether replicas that differed when they were staged are said instead of refused.
            say: is told of it.
        """
        halfway, self._halfway = self._halfway, None
        if halfway is None:
            return None
        restoring, parsed = halfway.restoring, halfway.restoring.parsed
        pooling = Pooling(parsed.manifest, as_payload(parsed.payload), restoring.pairs())
        try:
            pooling.exchange(self.ranks)
            strangers = pooling.strangers()
            if strangers and not lenient:
                return NotRecoverableError(refusal(strangers, self.ranks.rank))
            if strangers:
                say(acceptance(strangers))
            restoring.finish()
            self.clock.lap("gather")
            self._close(halfway.opened)
        except (HoldfastError, ShardError) as error:
            return error
        return None

    def drop(self) -> None:
        """Leave it as it is: the rest is to be had in another way, or not at all."""
        halfway, self._halfway = self._halfway, None
        if halfway is not None:
            with contextlib.suppress(HoldfastError):  # the daemon lets go of it when the next snapshot is committed
                self._close(halfway.opened)

    def _bring(self, snapshot: SnapshotId, attempt: int, epoch: int, *, verify: bool) -> None:
        request = messages.OpenShard(self.job, attempt, snapshot, self.ranks.rank, verify, epoch)
        self.stager.use_gpu(gpu_of(self.state))
        opened, image = self.stager.submit(
            lambda: self.stager.open_shard(request, patience_s=RESTORE_PATIENCE_S)
        ).result()
        self.clock.lap("open")
        shard = image[opened.offset_bytes : opened.offset_bytes + opened.shard_bytes]
        checks = Checks.of(image, opened)
        restoring = Restoring.begin(self.state, shard, allow_pickle=self.allow_pickle, checks=checks)
        restoring.copy()
        if restoring.parsed.manifest.pools:
            self._halfway = _Halfway(restoring, opened)
            self.clock.lap("copy")
            return
        restoring.finish()
        self.clock.lap("copy")
        self._close(opened)

    def _close(self, opened: messages.ShardOpened) -> None:
        self.stager.submit(lambda: self.stager.close_shard(opened)).result()
