"""A Lightning trainer with Holdfast: run it, kill it, run it again; it goes on in mid-epoch, bit for bit.

pip install 'holdfast[lightning]'
holdfast local --nodes 3 --parity 1        # in another terminal; copy its export line here
python examples/lightning_loop.py --epochs 5
"""

import argparse
import os
import signal
from collections.abc import Iterator

import torch
from holdfast.client.lightning import HoldfastCallback
from holdfast.client.state_hash import hash_state
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn

BATCHES = 12


class Numbers:
    """A loader that knows where it is: what Lightning needs to go on in mid-epoch."""

    def __init__(self) -> None:
        self.epoch, self.position = 0, 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        torch.empty(()).random_()  # torch's DataLoader draws a seed for its workers here, too
        return self._batches()

    def _batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if self.position == BATCHES:  # the trainer stops asking once it has had them all
            self.epoch, self.position = self.epoch + 1, 0
        while self.position < BATCHES:
            generator = torch.Generator().manual_seed(1000 * self.epoch + self.position)
            self.position += 1
            x = torch.rand(32, 8, generator=generator)
            yield x, x.sum(dim=1, keepdim=True).sin()

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


class Net(LightningModule):
    def __init__(self, kill_at: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.1), nn.GELU(), nn.Linear(64, 1))
        self.kill_at = kill_at

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        if self.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)  # as if the machine's memory had run out
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        print(
            f"step {self.global_step} epoch {self.current_epoch} batch {batch_idx} loss {loss.item().hex()}", flush=True
        )
        return loss

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.mse_loss(self.net(x), y), batch_size=len(x))

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--job", default="lightning-loop")
    parser.add_argument("--kill-at", type=int, default=-1, help="a step at which this process kills itself")
    arguments = parser.parse_args()

    seed_everything(0)
    model = Net(arguments.kill_at)
    trainer = Trainer(
        max_epochs=arguments.epochs,
        callbacks=[HoldfastCallback(job=arguments.job)],
        accelerator="cpu",
        devices=1,
        val_check_interval=0.5,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, Numbers(), Numbers())
    print(
        f"done at step {trainer.global_step}, state {hash_state({'model': model, 'optimizer': trainer.optimizers[0]})}"
    )


if __name__ == "__main__":
    main()
