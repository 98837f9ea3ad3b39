"""Snapshots in a Hugging Face Trainer. Needs `pip install holdfast[transformers]`; nothing else of Holdfast imports it.

    trainer = Trainer(model=model, args=args, train_dataset=dataset)
    HoldfastCallback(job="tiny-gpt").attach(trainer)
    trainer.train()      # run again after a crash, it goes on where it was, in mid-epoch

Covers when a Trainer's state can be taken and brought back, and what belongs to it.

A Trainer that resumes takes its place in the data from a folder's `trainer_state.json`, before it makes its optimizer.
So that file's text is part of each snapshot, is read ahead by ranges, and given to the Trainer in a folder of its own;
the tensors come back in place once they all exist. Should the two be of different steps (one was committed between),
the Trainer's loop begins anew with the right text.
"""

import functools
import io
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from holdfast.client.arguments import replicated_by
from holdfast.client.catalogue import load_objects, read_head
from holdfast.client.errors import HoldfastError
from holdfast.client.flatten import save_objects
from holdfast.client.ranges import RangeReader
from holdfast.client.ranks import Ranks
from holdfast.client.rng import capture_rng, restore_rng
from holdfast.client.snapshotter import Snapshotter
from holdfast.client.state_errors import ShardError, StateError
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

STARTS_MAX = 3  # of the Trainer's loop; the second knows what the first one found
STATE_FILE = "trainer_state.json"  # the Trainer's name for it
PROGRESS = "trainer"  # the name of its progress among the state


class HoldfastCallback(TrainerCallback):
    """Restores before the first step, then stages a snapshot before each step that follows one.

    What comes back: model, optimizer, learning rate scheduler, gradient scaler, random generators, the place in epoch
    and batches, what was summed up for the next log, the log history, and the state of callbacks as in a Trainer's own
    checkpoint. Evaluation and accumulated gradients need no care: a snapshot is taken before a step's first batch, or
    before an epoch begins. Its number is the `global_step`, as in the names of a Trainer's checkpoints.

    The data go on bit for bit where a batch depends on its number alone. The Trainer collates one batch ahead, so a
    dataset or collator that draws from the global random generators gives other batches after a restore.

    Where memory and durable copies have nothing to restore, `train(resume_from_checkpoint=...)` does what it says;
    where they have, they go before it.

    Args:
        job: the job's name.
        every: steps from one snapshot to the next.
        extra: more state, by name: anything with `state_dict` and `load_state_dict`.
        options: as for `Snapshotter`: `socket`, `process_group`, `max_stall_s`, `on_error`, `stage`, `allow_pickle`.

    Attributes:
        snapshotter: while `train` runs.
    """

    def __init__(self, *, job: str, every: int = 1, extra: Mapping[str, object] | None = None, **options: Any) -> None:  # noqa: ANN401  # as they are
        super().__init__()
        self.snapshotter: Snapshotter | None = None
        self._job, self._every, self._extra, self._options = job, every, dict(extra or {}), options
        self._progress: _Progress | None = None
        self._resume = _Resume(None)
        self._known = 0  # the step that was restored or staged last
        self._random: dict[str, object] | None = None  # to be set before the first step

    def attach(self, trainer: Trainer) -> Self:
        """Make `trainer.train()` restore and be protected. Returns this callback.

        Raises:
            HoldfastError: a Trainer that can't be protected; the text says why.
        """
        _check(trainer)
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        self._progress = _Progress(trainer)
        trainer._inner_training_loop = self._protected(trainer._inner_training_loop)  # noqa: SLF001  # see the file's head
        load = trainer._load_from_checkpoint  # noqa: SLF001

        def load_from_checkpoint(folder: str, model: torch.nn.Module | None = None) -> None:
            if not self._resume.is_mine(folder):  # where it is, the model comes from memory
                load(folder, model)

        trainer._load_from_checkpoint = load_from_checkpoint  # noqa: SLF001
        return self

    def _protected(self, loop: Callable[..., object]) -> Callable[..., object]:
        """The Trainer's loop, which begins where memory says, and whose end lets go of the daemon."""

        @functools.wraps(loop)
        def run(*arguments: object, **named: object) -> object:
            text = self._read_ahead()
            for _ in range(STARTS_MAX):
                self._resume = _Resume(text)
                try:
                    own = self._resume.folder
                    done = loop(*arguments, **{**named, "resume_from_checkpoint": own} if own is not None else named)
                except _OtherStepError as other:
                    self._let_go(other)
                    text = other.text
                except BaseException as error:
                    self._let_go(error)
                    raise
                else:
                    self._let_go(None)
                    return done
                finally:
                    self._resume.clean()
            raise HoldfastError(
                f"job {self._job}: what is committed changed {STARTS_MAX} times while this began: expected nobody else "
                "to train under its name; give this training a name of its own"
            )

        return run

    def _let_go(self, error: BaseException | None) -> None:
        """Wait for the last snapshot to commit; after an error let go at once."""
        snapshotter, self.snapshotter = self.snapshotter, None
        if snapshotter is not None:
            snapshotter.__exit__(type(error) if error is not None else None, error, None)

    def _read_ahead(self) -> str | None:
        """The Trainer's state in the newest committed snapshot; None if there is none yet. A collective."""
        ranks = Ranks(self._options.get("process_group"))
        text = ""
        if ranks.rank == 0:
            try:
                text = self._read_text()
            except (HoldfastError, ShardError):
                text = ""  # the restore comes to the same, and says it
        return ranks.exchange(text.encode())[0].decode() or None

    def _read_text(self) -> str:
        with RangeReader(job=self._job, socket=self._options.get("socket")) as reader:
            if reader.committed() is None:
                return ""
            allow_pickle = bool(self._options.get("allow_pickle"))
            objects, _ = load_objects(0, read_head(reader, 0), allow_pickle=allow_pickle)
        progress = objects.get(PROGRESS)  # another kind of program may have staged under this job's name
        return str(progress.get("text", "")) if isinstance(progress, dict) else ""

    # --- what the Trainer calls ---

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: object, **_: object) -> None:
        """Restore, now that the optimizer exists and all sums are at their beginning."""
        if self._progress is None:
            raise HoldfastError("HoldfastCallback: expected attach(trainer) before train(), found none; call it")
        trainer = self._progress.trainer
        self._progress = _Progress(trainer)  # of this start: an earlier one had another history
        self.snapshotter = Snapshotter(
            {**_state_of(trainer), PROGRESS: self._progress, **self._extra},
            job=self._job,
            every=self._every,
            **{"replicated": replicated_by(trainer.model_wrapped), **self._options},
        )
        restored = self.snapshotter.restore()
        if restored != self._resume.step:
            raise _OtherStepError(self._progress.text if restored is not None else None)
        self._resume.clean()
        self._known, self._random = state.global_step, None
        if restored is not None:
            self._random = capture_rng()
            self._progress.resume()

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: object, **_: object) -> None:
        """Stage what the epoch before has left: after it, its data are no longer the Trainer's place."""
        assert self._progress is not None
        if self._random is not None:
            restore_rng(self._progress.epoch_rng())  # whoever shuffles now shuffles as it did
            if float(state.epoch).is_integer():
                self._random = None  # and this is where it was
        self._progress.keep_epoch_rng()
        self._stage(state)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: object, **_: object) -> None:
        """Stage what the step before has left: its batches are there, and nothing else of it is done."""
        if self._random is not None:
            restore_rng(self._random)
            self._random = None
        self._stage(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: object, **_: object) -> None:
        """Stage the end, so that a training that is done stays done."""
        self._stage(state)

    def _stage(self, state: TrainerState) -> None:
        if self.snapshotter is not None and state.global_step > self._known:
            self._known = state.global_step
            self.snapshotter.step(self._known)


class _OtherStepError(Exception):
    """What was restored is not of the step that the Trainer resumed at."""

    def __init__(self, text: str | None) -> None:
        super().__init__("another step was committed meanwhile")
        self.text = text


class _Resume:
    """The folder that a Trainer resumes from, with nothing but the text of its state."""

    def __init__(self, text: str | None) -> None:
        self.step: int | None = None
        self.folder: str | None = None
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        if text is not None:
            self.step = int(json.loads(text)["global_step"])
            self._directory = tempfile.TemporaryDirectory(prefix="holdfast-")
            self.folder = self._directory.name
            (Path(self.folder) / STATE_FILE).write_text(text, encoding="utf-8")

    def is_mine(self, folder: str) -> bool:
        return folder == self.folder

    def clean(self) -> None:
        """Remove it. Safe to call twice."""
        if self._directory is not None:
            self._directory.cleanup()


class _Progress:
    """Where a Trainer is: its own state as text, what it adds up until the next log, and how the epoch began."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.text = ""  # of the state that was restored
        self._loaded: dict[str, Any] = {}
        self._epoch_rng = b""
        self._history: list[str] = []  # its entries as JSON: it only grows, and is asked for at every snapshot

    def state_dict(self) -> dict[str, object]:
        trainer = self.trainer
        return {
            "text": self._text(),
            "epoch_rng": self._epoch_rng,
            "loss_sum": trainer._tr_loss,  # noqa: SLF001  # of the steps since the last log; a tensor, never waited for
            "last_logged": trainer._globalstep_last_logged,  # noqa: SLF001
            "flos": trainer.current_flos,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded, self.text, self._epoch_rng = state, state["text"], state["epoch_rng"]

    def resume(self) -> None:
        """Go on adding up. What a `train()` returns as its loss stays the mean over its own steps."""
        trainer = self.trainer
        trainer._tr_loss.copy_(self._loaded["loss_sum"])  # noqa: SLF001
        trainer._globalstep_last_logged = self._loaded["last_logged"]  # noqa: SLF001
        trainer._total_loss_scalar = -trainer._tr_loss.item()  # noqa: SLF001
        trainer.current_flos = self._loaded["flos"]

    def keep_epoch_rng(self) -> None:
        self._epoch_rng = save_objects(capture_rng())

    def epoch_rng(self) -> dict[str, object]:
        states: dict[str, object] = torch.load(io.BytesIO(self._epoch_rng), weights_only=True)
        return states

    def _text(self) -> str:
        """What `TrainerState.save_to_json` would write, but for the layout."""
        trainer, state = self.trainer, self.trainer.state
        fields = {name: getattr(state, name) for name in type(state).__dataclass_fields__ if name != "log_history"}
        callbacks = [*trainer.callback_handler.callbacks, trainer.control]
        exported = TrainerState(stateful_callbacks=[each for each in callbacks if isinstance(each, ExportableState)])
        fields["stateful_callbacks"] = exported.stateful_callbacks
        if len(state.log_history) < len(self._history):
            self._history = []
        try:
            self._history += map(json.dumps, state.log_history[len(self._history) :])
            rest = json.dumps(fields, sort_keys=True)
        except (TypeError, ValueError) as error:
            raise StateError(
                f"{PROGRESS}: the Trainer's state can't be written as JSON: {error}; log plain numbers"
            ) from error
        return f'{{"log_history": [{", ".join(self._history)}], {rest[1:]}'


def _state_of(trainer: Trainer) -> dict[str, object]:
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate wraps it
    state = {"model": trainer.model, "optimizer": optimizer, "scheduler": trainer.lr_scheduler}
    scaler = getattr(trainer.accelerator, "scaler", None)
    if scaler is not None:
        state["scaler"] = scaler
    return state


def _check(trainer: Trainer) -> None:
    """Refuse what would be protected in name only."""
    lacking = [name for name in ("_inner_training_loop", "_load_from_checkpoint") if not hasattr(trainer, name)]
    if lacking:
        raise HoldfastError(
            f"HoldfastCallback: expected a Trainer with {lacking[0]}, as transformers from 5.24 on have it, found "
            f"transformers {transformers.__version__}; install another one"
        )
    if any(isinstance(each, HoldfastCallback) and each._progress for each in trainer.callback_handler.callbacks):  # noqa: SLF001
        raise HoldfastError("HoldfastCallback: expected one for a Trainer, found that one is attached to it already")
    if trainer.is_deepspeed_enabled:
        raise HoldfastError(
            "HoldfastCallback: expected a Trainer without DeepSpeed, whose engine keeps the state to itself, found one "
            "with it; use FSDP or DDP"
        )
    if trainer.args.auto_find_batch_size:
        raise HoldfastError(
            "HoldfastCallback: expected a fixed batch size, found auto_find_batch_size: a step would not mean the same "
            "data after a restart; set per_device_train_batch_size to what was found, and auto_find_batch_size=False"
        )
