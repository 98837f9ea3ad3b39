"""A Hugging Face Trainer with Holdfast: run it, kill it, run it again; it goes on in mid-epoch, bit for bit.

pip install 'holdfast[transformers]'
holdfast local --nodes 3 --parity 1        # in another terminal; copy its export line here
python examples/transformers_loop.py --epochs 5
"""

import argparse
import os
import signal
from pathlib import Path

import torch
from holdfast.client.state_hash import hash_state
from holdfast.client.transformers import HoldfastCallback
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)

TEXT = Path(__file__).parents[1] / "README.md"
BLOCK_BYTES = 32
BLOCKS = 108  # 27 batches of 4: the last step of an epoch has one batch, all others two


def blocks(*, first: int, count: int) -> list[dict[str, torch.Tensor]]:
    """Bytes of a text, each a token."""
    raw = torch.frombuffer(bytearray(TEXT.read_bytes()), dtype=torch.uint8).long()
    parts = raw[first * BLOCK_BYTES : (first + count) * BLOCK_BYTES].split(BLOCK_BYTES)
    return [{"input_ids": part, "labels": part} for part in parts]


class Loud(Trainer):
    """Prints each batch's loss to the last bit."""

    def training_step(self, *arguments: object, **named: object) -> torch.Tensor:
        loss = super().training_step(*arguments, **named)
        if self.is_world_process_zero():
            print(f"step {self.state.global_step} loss {loss.item().hex()}", flush=True)
        return loss


class Printer(TrainerCallback):
    def on_log(self, args: object, state: TrainerState, control: object, logs: dict[str, float], **_: object) -> None:
        for name in ("loss", "eval_loss"):
            if name in logs and state.is_world_process_zero:
                print(f"step {state.global_step} logged {name} {logs[name].hex()}", flush=True)


class Killer(TrainerCallback):
    """Ends this process amid a step's batches, as if the machine's memory had run out."""

    def __init__(self, kill_at: int, holdfast: HoldfastCallback) -> None:
        self.kill_at, self.holdfast = kill_at, holdfast

    def on_pre_optimizer_step(self, args: object, state: TrainerState, control: object, **_: object) -> None:
        if state.global_step == self.kill_at:
            self.holdfast.snapshotter.wait(max(self.kill_at - 2, 1))  # newer ones may be on their way
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--job", default="transformers-loop")
    parser.add_argument("--kill-at", type=int, default=-1, help="a step at which this process kills itself")
    parser.add_argument("--sampling", default="random", help="as train_sampling_strategy of TrainingArguments")
    arguments = parser.parse_args()

    set_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256,
            n_positions=BLOCK_BYTES,
            n_embd=32,
            n_layer=2,
            n_head=2,
            bos_token_id=None,
            eos_token_id=None,
        )
    )  # with dropout, as GPT-2 has it
    trainer = Loud(
        model=model,
        args=TrainingArguments(
            output_dir="transformers-loop",
            num_train_epochs=arguments.epochs,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            train_sampling_strategy=arguments.sampling,
            logging_steps=3,
            eval_strategy="steps",
            eval_steps=5,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=blocks(first=0, count=BLOCKS),
        eval_dataset=blocks(first=BLOCKS, count=8),
        callbacks=[Printer()],
    )
    holdfast = HoldfastCallback(job=arguments.job).attach(trainer)
    trainer.add_callback(Killer(arguments.kill_at, holdfast))
    trainer.train()
    state = {"model": model, "optimizer": trainer.optimizer.optimizer, "scheduler": trainer.lr_scheduler}
    if trainer.is_world_process_zero():
        print(f"done at step {trainer.state.global_step}, state {hash_state(state)}")


if __name__ == "__main__":
    main()
