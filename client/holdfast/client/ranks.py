"""The other ranks of the job: who we are among them, and one exchange of bytes over the job's own process group.

Covers the few collectives that a plan and a restore need. Nothing is pickled: payloads travel as uint8 tensors.
"""

import os

import torch
import torch.distributed as dist
from holdfast.client.errors import HoldfastError


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
