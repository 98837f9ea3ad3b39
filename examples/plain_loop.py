"""A plain training loop with Holdfast: run it, kill it, run it again.

holdfast local --nodes 3 --parity 1        # in another terminal; copy its export line here
python examples/plain_loop.py --steps 200
"""

import argparse

import torch
from holdfast.client import Snapshotter
from torch import nn


class Numbers:
    """A data source whose position is part of the state."""

    def __init__(self) -> None:
        self.position = 0

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.position)
        self.position += 1
        x = torch.rand(32, 8, generator=generator)
        return x, x.sum(dim=1, keepdim=True).sin()

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--job", default="plain-loop")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.1), nn.GELU(), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=20)
    data = Numbers()

    snapshotter = Snapshotter(
        {"model": model, "optimizer": optimizer, "scheduler": scheduler, "data": data}, job=arguments.job, every=1
    )
    start = snapshotter.restore()
    print("starting anew" if start is None else f"restored step {start}")
    for step in range(0 if start is None else start + 1, arguments.steps):
        x, y = data.next_batch()
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        snapshotter.step(step)
        if step % 20 == 0:
            print(f"step {step} loss {loss.item():.6f}")
    snapshotter.close()
    print(f"done: {snapshotter.stats()}")


if __name__ == "__main__":
    main()
