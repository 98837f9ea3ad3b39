"""The other ranks of the job: who we are among them, and one exchange of bytes over the job's own process group.

Covers the few collectives that a plan and a restore need: small texts among all ranks, large bytes among replicas.
Nothing is pickled: payloads travel as uint8 tensors.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from holdfast.client.errors import HoldfastError

GATHER_TIMEOUT = timedelta(minutes=10)  # torch's own for NCCL: a replica that does not come by then is gone


@dataclass(frozen=True, slots=True)
class Gathering:
    """Some ranks that give each other bytes over a process group of theirs.

    Attributes:
        members: their numbers in the default process group, in their order.
        device: where the bytes must lie.
    """

    group: dist.ProcessGroup | None
    members: Sequence[int]
    device: torch.device

    def gather(self, parts: Sequence[torch.Tensor], index: int) -> None:
        """Fill all of `parts` but the one at `index`, which is this rank's own. A collective.

        Args:
            parts: one for each member, in their order: uint8 on `device`, of the same length everywhere.
            index: this rank's place among the members.
        """
        if self.device.type == "cuda":
            dist.all_gather(list(parts), parts[index], group=self.group)
            return
        # Gloo's all_gather of some MiB takes about ten times as long as a broadcast by each.
        for part, member in zip(parts, self.members, strict=True):
            dist.broadcast(part, member, group=self.group)


class Ranks:
    """This rank's place in a process group, or alone."""

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        self._alone = not (dist.is_available() and dist.is_initialized())
        self._group = process_group
        if self._alone and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise HoldfastError(
                f"expected an initialised process group for WORLD_SIZE={os.environ['WORLD_SIZE']}, found none; call "
                "torch.distributed.init_process_group() before making a Snapshotter"
            )
        self.rank = 0 if self._alone else dist.get_rank(process_group)
        self.world_size = 1 if self._alone else dist.get_world_size(process_group)
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))

    def role_of(self, global_rank: int) -> int | None:
        """The group's number for a rank of the default group; None if it is not in the group."""
        if self._alone:
            return 0 if global_rank == 0 else None
        if self._group is None:
            return global_rank if global_rank < self.world_size else None
        try:
            return dist.get_group_rank(self._group, global_rank)
        except ValueError:
            return None

    @contextlib.contextmanager
    def gathering(self, roles: Sequence[int]) -> Iterator["Gathering"]:
        """A way for these ranks to give each other bytes. A collective among them; they end it together.

        Ranks in several sets enter them in the same order.
        """
        members = list(roles) if self._group is None else [dist.get_global_rank(self._group, role) for role in roles]
        if len(roles) == self.world_size:
            yield Gathering(self._group, members, self._device())
            return
        backend = dist.get_backend(self._group)
        group = dist.new_group(members, GATHER_TIMEOUT, backend, use_local_synchronization=True)
        try:
            yield Gathering(group, members, self._device())
        finally:
            dist.destroy_process_group(group)

    def exchange(self, payload: bytes) -> list[bytes]:
        """Every rank's payload, by rank. A collective: all ranks call it together."""
        if self._alone:
            return [payload]
        device = self._device()
        size = torch.tensor([len(payload)], dtype=torch.int64, device=device)
        sizes = [torch.zeros_like(size) for _ in range(self.world_size)]
        dist.all_gather(sizes, size, group=self._group)
        longest = max(int(s.item()) for s in sizes)
        mine = torch.zeros(longest, dtype=torch.uint8, device=device)
        mine[: len(payload)] = torch.frombuffer(bytearray(payload) or bytearray(1), dtype=torch.uint8)[: len(payload)]
        parts = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(parts, mine, group=self._group)
        return [part[: int(s.item())].cpu().numpy().tobytes() for part, s in zip(parts, sizes, strict=True)]

    def _device(self) -> torch.device:
        backend = dist.get_backend(self._group)
        return torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")
