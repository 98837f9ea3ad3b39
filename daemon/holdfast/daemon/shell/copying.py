"""Durable copies: a process with torch for each, niced, watched by a thread of its own, ended with the daemon.

Covers starting it, its deadline, and turning its end into an event. This room never imports torch: the client's room
has the program, and only its name is known here.
"""

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
from holdfast.daemon.core import actions, events
from holdfast.protocol import limits
from holdfast.protocol.fields import Count
from holdfast.protocol.ids import SnapshotId

log = logging.getLogger(__name__)

PROGRAM = "holdfast.client.copy"
NICENESS = 19  # training comes first
TEXT_BYTES_MAX = 2000  # of what the process said last: the end of a traceback


class _Told(msgspec.Struct, frozen=True):
    """What the process says of a copy that it made; it says more, for people."""

    attempt: Count
    step: Count
    size_bytes: Count
    seconds: Annotated[float, msgspec.Meta(ge=0, le=limits.COPY_DEADLINE_S * 2)]


class Copier:
    """Makes one copy at a time; the core orders no second one before it heard of the first one's end."""

    def __init__(self, socket: Path, node: str, report: Callable[[events.Event], None]) -> None:
        self._socket, self._node, self._report = socket, node, report
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None

    def order(self, action: actions.CopyDurably, *, program: str = PROGRAM, deadline_s: float | None = None) -> None:
        """Start a copy; its end is reported from another thread."""
        command = [
            "nice", "-n", str(NICENESS), sys.executable, "-m", program, "--job", action.job, "--root", action.directory,
            "--keep", str(action.keep), "--node", self._node, "--socket", str(self._socket),
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # torch would take all cores
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
            )
        except OSError as error:
            self._report(events.CopyFailed(action.job, f"{command[0]} can't be started: {error}"))
            return
        limit_s = limits.COPY_DEADLINE_S if deadline_s is None else deadline_s
        self._thread = threading.Thread(
            target=self._watch, args=(action.job, self._process, limit_s), name="copying", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """End what is under way; it leaves nothing that can be seen."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
        if self._thread is not None:
            self._thread.join(timeout=1.0)  # a process that hangs in a dead file system can't be waited for

    def _watch(self, job: str, process: subprocess.Popen[bytes], limit_s: float) -> None:
        try:
            said, complaint = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            self._report(events.CopyFailed(job, f"not done within {limit_s:.0f} s: the directory is too slow or hangs"))
            process.communicate()  # may last as long as the file system hangs; nobody waits for this thread
            return
        if process.returncode:
            text = complaint[-TEXT_BYTES_MAX:].decode(errors="replace").strip().rpartition("\n")[2]
            reason = text.removeprefix("holdfast: ") or f"the copying process ended with {process.returncode}"
            self._report(events.CopyFailed(job, reason))
            return
        try:
            told = msgspec.json.decode(said, type=_Told)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            self._report(events.CopyFailed(job, f"the copying process said something else than expected: {error}"))
            return
        self._report(events.DurablyCopied(job, SnapshotId(told.attempt, told.step), told.size_bytes, told.seconds))
