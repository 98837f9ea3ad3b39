"""Snapshots in a Lightning trainer. Needs `pip install holdfast[lightning]`; nothing else of Holdfast imports it.

    trainer = Trainer(callbacks=[HoldfastCallback(job="tiny-gpt")], ...)
    trainer.fit(model, loader)      # run again after a crash, it goes on where it was, in mid-epoch

Covers when Lightning's state can be taken and brought back, and what belongs to it.
"""

import warnings
from collections.abc import Mapping
from typing import Any

from holdfast.client.arguments import replicated_by
from holdfast.client.flatten import Stateful
from holdfast.client.rng import capture_rng, restore_rng
from holdfast.client.snapshotter import Snapshotter
from lightning.pytorch import Callback, LightningModule, Trainer


class HoldfastCallback(Callback):
    """Restores before the first batch, then stages a snapshot after each batch that can be resumed from exactly.

    What comes back: the module, optimizers, learning rate schedulers, gradient scaler, the position in epoch and
    batches, random generators, the data module's and the other callbacks' `state_dict`, and the train loader's where
    it has `state_dict` and `load_state_dict` (without, the epoch's data begin anew, as Lightning warns).

    A batch can be resumed from if an optimizer stepped in it (not amid accumulated gradients), if it is not the last
    of its epoch and no validation follows it: what follows would not be done again. So snapshots are counted by such
    batches, from 0 on; that count is the `step` that commands show, and Lightning's own is `trainer.global_step`.

    Args:
        job: the job's name.
        every: batches that can be resumed from, from one snapshot to the next.
        extra: more state, by name: anything with `state_dict` and `load_state_dict`. Lightning's `on_save_checkpoint`
            is not called.
        options: as for `Snapshotter`: `socket`, `process_group`, `max_stall_s`, `on_error`, `stage`, `allow_pickle`.

    Attributes:
        snapshotter: while `fit` runs.
    """

    def __init__(self, *, job: str, every: int = 1, extra: Mapping[str, object] | None = None, **options: Any) -> None:  # noqa: ANN401  # as they are
        super().__init__()
        self.snapshotter: Snapshotter | None = None
        self._job, self._every, self._extra, self._options = job, every, dict(extra or {}), options
        self._count = 0
        self._stepped = -1  # Lightning's count of optimizer steps when this looked last
        self._random: dict[str, object] | None = None
        self._points = 0  # batches of this epoch that can be resumed from

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore, now that the optimizers exist and before the loaders are asked."""
        state = {**_state_of(trainer, pl_module, self), **self._extra}
        options = {"replicated": replicated_by(trainer.strategy.model), **self._options}
        self.snapshotter = Snapshotter(state, job=self._job, every=self._every, **options)
        restored = self.snapshotter.restore()
        self._count, self._random = 0, None
        if restored is not None:
            self._count, self._random = restored + 1, capture_rng()
        self._stepped = trainer.global_step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the random generators again: loaders that begin to be read draw from them."""
        if self._random is not None:
            restore_rng(self._random)
            self._random = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Stage a snapshot, if this batch can be resumed from."""
        stepped, self._stepped = trainer.global_step != self._stepped, trainer.global_step
        if not stepped or trainer.is_last_batch or _validation_follows(trainer, batch_idx):
            return
        assert self.snapshotter is not None
        self._points += 1
        self._count += 1
        self.snapshotter.step(self._count - 1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if nothing of a whole epoch could be protected."""
        if not self._points:
            warnings.warn(
                "holdfast: no batch of this epoch can be resumed from: expected one with an optimizer's step that is "
                "neither the epoch's last nor followed by validation; make epochs longer or validate less often",
                RuntimeWarning,
                stacklevel=2,
            )
        self._points = 0

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the last snapshot to commit."""
        snapshotter, self.snapshotter = self.snapshotter, None
        if snapshotter is not None:
            snapshotter.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go at once."""
        snapshotter, self.snapshotter = self.snapshotter, None
        if snapshotter is not None:
            snapshotter.__exit__(type(exception), exception, None)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go, whatever ended the run."""
        self.on_fit_end(trainer, pl_module)


class _Loops:
    """Where Lightning is in epochs and batches, and in the loader."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self._trainer.fit_loop.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._trainer.fit_loop.load_state_dict(state)


class _Callbacks:
    """The other callbacks' states."""

    def __init__(self, trainer: Trainer, me: Callback) -> None:
        self._others = [callback for callback in trainer.callbacks if callback is not me]

    def state_dict(self) -> dict[str, Any]:
        return {callback.state_key: callback.state_dict() for callback in self._others}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for callback in self._others:
            if state.get(callback.state_key):
                callback.load_state_dict(state[callback.state_key])


def _state_of(trainer: Trainer, module: LightningModule, me: Callback) -> dict[str, object]:
    state: dict[str, object] = {"model": module}
    state.update((f"optimizer_{index}", optimizer) for index, optimizer in enumerate(trainer.optimizers))
    state.update((f"scheduler_{index}", each.scheduler) for index, each in enumerate(trainer.lr_scheduler_configs))
    state.update(precision=trainer.precision_plugin, callbacks=_Callbacks(trainer, me), loops=_Loops(trainer))
    data: object = getattr(trainer, "datamodule", None)
    if isinstance(data, Stateful):
        state["data"] = data
    return state


def _validation_follows(trainer: Trainer, batch_idx: int) -> bool:
    between = trainer.val_check_batch
    if not trainer.enable_validation or between is None or between == float("inf"):
        return False
    if trainer.check_val_every_n_epoch is None:
        batch_idx = trainer.fit_loop.total_batch_idx
    return (batch_idx + 1) % int(between) == 0
