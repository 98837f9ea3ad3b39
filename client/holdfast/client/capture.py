"""One snapshot of a rank on its way into a shard's memory.

``ShardLayout.capture`` makes it in the training thread; ``start`` and ``finish`` run in the staging thread;
``hold_updates`` is how the training thread is allowed to change the state again.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic

import numpy as np
from holdfast.client.lanes import Lane
from holdfast.client.manifest import Header
from holdfast.client.signs import Signs
from holdfast.client.state_errors import LayoutChangedError, StateError, TornSnapshotError
from holdfast.client.tensor_bytes import ByteArray

COPY_S_MAX = 120.0  # a device that has not copied a state by then hangs
_LOOK_S = 0.0005  # between two looks at a device: no thread is kept busy, and nothing takes so little time
_HEAD_START_S = 0.02  # what devices copy alone, before this thread needs the interpreter that training needs, too


@dataclass(frozen=True, slots=True)
class Copies:
    """What all snapshots of one plan share.

    Attributes:
        host: What copies the tensors in the host's memory; None if there are none.
        devices: What copies those of each other device.
        reshaped: Whether a tensor's shape changed where the look at the state does not see it.
    """

    host: Lane | None
    devices: Sequence[Lane]
    signs: Signs
    reshaped: Callable[[], bool]
    lazy_bytes: int


class Capture:
    """One snapshot of a rank, half copied: ``write`` brings all of it into a shard's memory.

    Attributes:
        on_host: Whether ``start`` returns only once everything is copied.
        lazy_bytes: What is read from the trainer's live tensors after the capture.
        eager_bytes: What was copied at once, plain objects included.
    """

    def __init__(
        self,
        copies: Copies,
        header: Header,
        head: ByteArray,
        objects: Callable[[], bytes],
        done: Callable[[ByteArray, LayoutChangedError | None], None],
    ) -> None:
        """Use ``ShardLayout.capture``; `objects` serializes what was captured of them, `done` takes the head back."""
        self._copies, self._header, self._done = copies, header, done
        self._head: ByteArray | None = head
        self._shard: ByteArray | None = None  # between `start` and `finish`, where the head is written in `finish`
        self._objects = objects
        self.on_host = not copies.devices
        self.lazy_bytes, self.eager_bytes = copies.lazy_bytes, head.nbytes
        self._lock = threading.Lock()  # between `hold_updates` and the staging thread
        self._checked = self._started = self._ready = self._abandoned = False
        self._torn: list[str] = []
        self._noted = copies.signs.now()
        self._on_devices = [lane.depart() for lane in copies.devices]
        self._on_host = [] if copies.host is None else [copies.host.depart()]

    def write(self, target: memoryview) -> None:
        """Write the whole shard, once: ``start`` and ``finish``. The interpreter lock is free during large copies."""
        self.start(target)
        self.finish()

    def start(self, target: memoryview) -> None:
        """Copy what the host copies; have devices copy the rest. Staging thread.

        Args:
            target: Writable contiguous memory of exactly ``shard_bytes``; every byte of it is overwritten. No reference
                to it is kept after ``finish``.

        Raises:
            StateError: the target is of another size or read-only, or this was written before.
            LayoutChangedError: the plain objects outgrew their room, or a tensor has another shape.
            TornSnapshotError: a tensor was changed in place or an optimizer's step began since the capture; the target
                holds a mixture and must be discarded.
        """
        expected_bytes = self._header.shard_bytes
        if target.nbytes != expected_bytes or target.readonly or not target.c_contiguous:
            raise StateError(
                f"expected {expected_bytes} bytes of writable contiguous memory, found "
                f"{target.nbytes}{' read-only' if target.readonly else ''}"
            )
        if self._head is None or self._shard is not None:
            raise StateError("this capture was written before: capture again")
        self._write(np.frombuffer(target, dtype=np.uint8))
        if self.on_host:
            self.check()

    def _write(self, shard: ByteArray) -> None:
        if self.on_host:
            self._describe(shard)
        try:
            self._start(shard[self._header.payload_offset :])
        except BaseException:
            self._let_go(None)
            raise
        if not self.on_host:
            self._shard = shard  # training waits for this thread until now, and must not for the rest

    def _describe(self, shard: ByteArray) -> None:
        """Write all but the payload that is still to come, if it can be said what that will be."""
        changed: LayoutChangedError | None = None
        assert self._head is not None
        try:
            if self._copies.reshaped():
                raise LayoutChangedError("a tensor has another shape in the same memory: build a new layout")
            self._fill_head(self._head)
            np.copyto(shard[: self._head.nbytes], self._head)
        except LayoutChangedError as error:
            changed = error
            raise
        finally:
            self._let_go(changed)

    def _let_go(self, changed: LayoutChangedError | None) -> None:
        head, self._head = self._head, None
        if head is not None:
            self._done(head, changed)

    def _start(self, payload: ByteArray) -> None:
        with self._lock:  # whoever holds updates sees either nothing under way or all of it
            self._check_wanted()
            self._started = True  # also where one of them fails midway: what was begun is waited for
            for passage in self._on_devices:
                passage.start(payload)
        for passage in self._on_host:
            passage.start(payload)
        with self._lock:
            self._check_wanted()
            self._ready = True

    def _check_wanted(self) -> None:
        if self._abandoned:
            raise TornSnapshotError("an update had to go on before everything was copied")

    def _fill_head(self, head: ByteArray) -> None:
        objects = self._objects()
        header = self._header._replace(objects_bytes=len(objects))
        if header.objects_bytes > header.objects_capacity_bytes:
            raise LayoutChangedError(
                f"the plain objects grew to {header.objects_bytes} bytes, this layout has room for "
                f"{header.objects_capacity_bytes}: build a new layout"
            )
        packed = header.pack()
        head[: len(packed)] = np.frombuffer(packed, dtype=np.uint8)
        start, end = header.objects_offset, header.objects_offset + len(objects)
        head[start:end] = np.frombuffer(objects, dtype=np.uint8)
        head[end : header.payload_offset] = 0  # an earlier, longer archive's end

    def hold_updates(self) -> None:
        """What the training thread does to the state from now on, devices do after the copy. Training thread.

        Call it when ``start`` has returned. Before that it gives the snapshot up: ``start`` will say so.
        """
        with self._lock:
            self._abandoned = not self._ready
            self._look()
            if self._started:
                for passage in self._on_devices:
                    passage.hold_updates()

    def check(self) -> None:
        """Whether the state is still what it was at the capture; looked at once, at the latest when the copy ends.

        Raises:
            TornSnapshotError: it is not; the text names what changed.
        """
        with self._lock:
            self._look()
        if self._torn:
            raise TornSnapshotError(
                f"{self._torn[0]}: changed while it was copied, {len(self._torn)} in all: call "
                "snapshotter.before_update() before changing parameters or optimizer state"
            )

    def _look(self) -> None:
        if not self._checked:
            self._checked = True
            self._torn = self._copies.signs.changed_since(self._noted)

    def finish(self, *, timeout_s: float = COPY_S_MAX) -> None:
        """Wait for the devices, then make sure that nothing changed meanwhile. Staging thread, after ``start``.

        Raises:
            TornSnapshotError: as ``start``; or the devices did not copy in time.
            LayoutChangedError: as ``start``.
        """
        shard, self._shard = self._shard, None
        if shard is not None:
            self.settle(timeout_s=min(timeout_s, _HEAD_START_S))
            self._describe(shard)
        if not self.settle(timeout_s=timeout_s):
            raise TornSnapshotError(f"a device did not copy {self.lazy_bytes} bytes within {timeout_s} s")
        self.check()

    def settle(self, *, timeout_s: float = COPY_S_MAX) -> bool:
        """Wait until no device writes into the target any more; False if that takes too long."""
        deadline_s = monotonic() + timeout_s
        pause = threading.Event()
        while self._started and not all(passage.finished() for passage in self._on_devices):
            if monotonic() >= deadline_s:
                return False
            pause.wait(_LOOK_S)
        return True
