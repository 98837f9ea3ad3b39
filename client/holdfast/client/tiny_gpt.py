"""A small but whole training program: a byte-level GPT on real text, protected by a Snapshotter.

It is what the demonstration runs and kills, and an example of the few lines that protection takes.
Run it alone or under torchrun; each rank appends what happens to it to a file of JSON lines.

Everything that a restart must bring back is here on purpose: sharded parameters, optimizer state, a
warm-up schedule, dropout (so the random generators matter), and a position in the data per rank.
"""

import argparse
import gc
import json
import os
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from holdfast.client.state_hash import hash_state
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

if TYPE_CHECKING:
    from holdfast.client import Snapshotter

TEXT_BYTES_MAX = 8 << 20  # of real text; more would only cost memory in each rank
BYTE_VALUES = 256
PEER_TIMEOUT_S = 60.0  # a collective that waits longer has lost a rank
MODES = ("plain", "ddp", "fsdp")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What one run is: the model's size, the schedule, and what to report."""

    steps: int
    events: Path
    hash_steps: frozenset[int] = frozenset()
    snapshots: bool = True
    data: Path = Path(sysconfig.get_path("stdlib"))
    mode: str = "plain"
    layers: int = 4
    width: int = 256
    heads: int = 4
    context: int = 64
    batch: int = 2
    dropout: float = 0.1
    learning_rate: float = 1e-3
    warm_up_steps: int = 10
    seed: int = 1
    every: int = 1
    job: str = "tiny-gpt"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"expected a mode of {MODES}, found {self.mode!r}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} cannot be shared by {self.heads} heads")
        if min(self.steps, self.layers, self.context, self.batch, self.warm_up_steps) < 1:
            raise ValueError("steps, layers, context, batch and warm-up steps must be at least 1")


class Block(nn.Module):
    """Causal attention and a two-layer network, each behind a norm and beside a shortcut."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        width = options.width
        self.heads, self.dropout = options.heads, options.dropout
        self.attention_norm, self.network_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention_in = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.network_in, self.network_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` and the result: (batch, context, width)."""
        batch, context, width = x.shape
        parts = self.attention_in(self.attention_norm(x)).chunk(3, dim=-1)
        query, key, value = (
            part.view(batch, context, self.heads, width // self.heads).transpose(1, 2) for part in parts
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        mixed = self.attention_out(mixed.transpose(1, 2).reshape(batch, context, width))
        x = x + F.dropout(mixed, self.dropout, self.training)
        hidden = self.network_out(F.gelu(self.network_in(self.network_norm(x))))
        return x + F.dropout(hidden, self.dropout, self.training)


class TinyGpt(nn.Module):
    """Bytes in, a guess about the next byte out. The output layer shares the embedding's weight."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.token = nn.Embedding(BYTE_VALUES, options.width)
        self.position = nn.Embedding(options.context, options.width)
        self.blocks = nn.ModuleList(Block(options) for _ in range(options.layers))
        self.norm = nn.LayerNorm(options.width)
        self.head = nn.Linear(options.width, BYTE_VALUES, bias=False)
        nn.init.normal_(self.token.weight, std=0.02)
        self.head.weight = self.token.weight
        self.register_buffer("places", torch.arange(options.context), persistent=False)
        self.dropout = options.dropout

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """``text``: (batch, context), int64; the result: (batch, context, 256) logits."""
        x = self.token(text) + self.position(self.places)
        x = F.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


class ByteStream:
    """One rank's part of the text, batch after batch, round and round; it knows where it is."""

    def __init__(self, text: bytes, options: Options, *, rank: int, world_size: int) -> None:
        part_bytes = len(text) // world_size
        self.batch, self.context = options.batch, options.context
        if part_bytes <= self.batch * self.context:
            raise ValueError(
                f"{options.data}: {len(text)} bytes of text for {world_size} ranks, expected more "
                f"than {self.batch * self.context} for each: give a larger folder"
            )
        part = bytearray(text[rank * part_bytes : (rank + 1) * part_bytes])
        self.text = torch.frombuffer(part, dtype=torch.uint8)
        self.position = 0
        self.rounds = 0

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Text and, shifted by one, what comes next: two times (batch, context), int64."""
        wanted = self.batch * self.context
        if self.position + wanted + 1 > len(self.text):
            self.position = 0
            self.rounds += 1
        window = self.text[self.position : self.position + wanted + 1].long()
        self.position += wanted
        shape = (self.batch, self.context)
        return window[:-1].view(shape), window[1:].view(shape)

    def state_dict(self) -> dict[str, object]:
        """Where the next batch begins."""
        return {"position": self.position, "rounds": self.rounds}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self.position, self.rounds = state["position"], state["rounds"]


class EventFile:
    """Appends JSON lines; a line is one write, so the ranks' lines never mix."""

    def __init__(self, path: Path, rank: int) -> None:
        self.rank = rank
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def append(self, event: str, **fields: object) -> None:
        """Write one event of this rank."""
        line = json.dumps({"event": event, "rank": self.rank, **fields}) + "\n"
        os.write(self.file, line.encode())

    def close(self) -> None:
        """Close the file; nothing is buffered."""
        os.close(self.file)


class Training:
    """The model, its optimizer, schedule and data, and how one step of them goes."""

    def __init__(self, options: Options, *, rank: int, world_size: int) -> None:
        torch.manual_seed(options.seed)  # the same first weights on every rank
        self.world_size = world_size
        self.model = _distribute(TinyGpt(options), options.mode)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=options.learning_rate, foreach=True)
        warm_up_steps = options.warm_up_steps
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / warm_up_steps)
        )
        self.data = ByteStream(read_text(options.data), options, rank=rank, world_size=world_size)
        torch.manual_seed(options.seed + 1 + rank)  # from here on each rank drops out its own

    def state(self) -> dict[str, object]:
        """Everything that a restart must bring back."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "data": self.data,
        }

    def step(self) -> float:
        """One step of training; the loss, averaged over all ranks and equal on each."""
        text, following = self.data.next_batch()
        logits = self.model(text)
        loss = F.cross_entropy(logits.flatten(0, 1), following.flatten())
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it without types
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.scheduler.step()
        mean = loss.detach()
        if self.world_size > 1:
            dist.all_reduce(mean)
        return float(mean) / self.world_size


def read_text(folder: Path) -> bytes:
    """The folder's Python sources, one behind the other in the order of their names."""
    parts: list[bytes] = []
    room_bytes = TEXT_BYTES_MAX
    for path in sorted(folder.glob("*.py")):
        parts.append(path.read_bytes()[:room_bytes])
        room_bytes -= len(parts[-1])
    return b"".join(parts)


@contextmanager
def ranks() -> Iterator[tuple[int, int]]:
    """This process's rank and the world's size, in a process group if there are several."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield 0, 1
        return
    dist.init_process_group("gloo", timeout=timedelta(seconds=PEER_TIMEOUT_S))
    yield dist.get_rank(), world_size
    # Not in a finally: after an error a peer may be gone, and leaving the group would wait for it.
    dist.destroy_process_group()


def train(options: Options, *, rank: int, world_size: int) -> None:
    """Train from the start, or from the newest committed step; report to the events file."""
    events = EventFile(options.events, rank)
    events.append(
        "start",
        pid=os.getpid(),
        restart_count=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        monotonic_ns=time.monotonic_ns(),
    )
    training = Training(options, rank=rank, world_size=world_size)
    state = training.state()
    snapshotter = _snapshotter(state, options) if options.snapshots else None
    started_s = time.monotonic()
    start = None if snapshotter is None else snapshotter.restore()
    if start is not None:
        seconds = time.monotonic() - started_s
        events.append("restored", step=start, sha256=hash_state(state), seconds=seconds)
    stalled_s = _stall_s(snapshotter)
    for step in range(0 if start is None else start + 1, options.steps):
        started_s = time.monotonic()
        loss = training.step()
        if snapshotter is not None:
            snapshotter.step(step)
        seconds, total_s = time.monotonic() - started_s, _stall_s(snapshotter)
        _report(events, step, loss, seconds=seconds, stall_s=total_s - stalled_s)
        stalled_s = total_s
        if step in options.hash_steps or step == options.steps - 1:
            final = {"final": True} if step == options.steps - 1 else {}
            events.append("hash", step=step, sha256=hash_state(state), **final)
    stats = None
    if snapshotter is not None:
        snapshotter.close()
        stats = snapshotter.stats()
    events.append("end", stats=stats)
    events.close()


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and train."""
    torch.set_num_threads(1)  # several ranks share the demonstration's few cores
    torch.use_deterministic_algorithms(mode=True)
    options = parse(arguments)
    with ranks() as (rank, world_size):
        train(options, rank=rank, world_size=world_size)
    gc.freeze()  # else the interpreter looks through all of torch's objects once more before it ends, for half a second


def parse(arguments: list[str] | None) -> Options:
    """Options from a command line; what is not given keeps its default."""
    parser = argparse.ArgumentParser(prog="holdfast.client.tiny_gpt", description=__doc__)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--events", type=Path, required=True, help="JSON lines are appended here")
    parser.add_argument("--hash-steps", type=_steps, help="comma-separated steps to hash after")
    parser.add_argument("--no-snapshots", dest="snapshots", action="store_false", default=None)
    parser.add_argument("--data", type=Path, help="folder of *.py to read; default: Python's own")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--dropout", type=float)
    parser.add_argument("--job")
    for name in ("layers", "width", "heads", "context", "batch", "warm-up-steps", "seed", "every"):
        parser.add_argument(f"--{name}", type=int)
    for mode in MODES:
        parser.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode)
    given = {key: value for key, value in vars(parser.parse_args(arguments)).items() if value is not None}
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    given.setdefault("mode", "fsdp" if several else "plain")
    try:
        return Options(**given)
    except ValueError as error:
        parser.error(str(error))


def _snapshotter(state: dict[str, object], options: Options) -> "Snapshotter":
    # Imported here, so that a run without snapshots needs nothing of it.
    from holdfast.client import Snapshotter  # noqa: PLC0415

    return Snapshotter(state, job=options.job, every=options.every)


def _stall_s(snapshotter: "Snapshotter | None") -> float:
    """Seconds that protection held up training so far, in step() or before an update."""
    return 0.0 if snapshotter is None else float(snapshotter.stats()["stall_s"]["total"])


def _report(events: EventFile, step: int, loss: float, *, seconds: float, stall_s: float) -> None:
    events.append("step", step=step, loss=loss, loss_hex=loss.hex(), seconds=seconds, stall_s=stall_s)


def _distribute(model: TinyGpt, mode: str) -> nn.Module:
    if mode == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if mode == "fsdp":
        # Imported here: it takes half a second that the other modes need not pay.
        from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

        for block in model.blocks:
            fully_shard(block, reshard_after_forward=False)
        fully_shard(model)
    return model


def _steps(text: str) -> frozenset[int]:
    return frozenset(int(part) for part in text.split(",") if part)


if __name__ == "__main__":
    main()
