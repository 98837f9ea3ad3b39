"""A training rank in a process of its own, told what to do line by line, so that it can be killed and frozen.

The same file is both sides: `RankProcess` in the test, and, run as a script, the rank. The rank's state is one tensor
whose content is a function of (rank, step), so that what was restored can be compared without asking anybody.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from holdfast.client import Snapshotter
from holdfast.client.capture import Capture

ANSWER_S = 60.0  # a process that imports torch on a busy machine


class RankProcess:
    """The test's side."""

    def __init__(self, *, socket: Path | str, job: str, rank: int = 0, world: int = 1, meet: Path | None = None,
                 size_bytes: int = 1 << 20, every: int = 1, on_error: str = "raise",
                 inside: Sequence[str] = ()) -> None:  # fmt: skip
        options = {
            "socket": str(socket), "job": job, "rank": rank, "world": world, "size_bytes": size_bytes,
            "meet": str(meet) if meet else "", "every": every, "on_error": on_error,
        }  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world), "RANK": str(rank)}
        self.process = subprocess.Popen(
            [*inside, sys.executable, __file__, json.dumps(options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True,
        )  # fmt: skip
        self._unread = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait(ANSWER_S)

    def tell(self, do: str, **what: object) -> None:
        """Say what to do; `answer` waits for it."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **what}).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self, *, seconds: float = ANSWER_S) -> dict[str, Any]:
        """The answer to what was told first."""
        assert self.process.stdout is not None
        deadline_s = time.monotonic() + seconds
        while b"\n" not in self._unread:
            left_s = deadline_s - time.monotonic()
            assert left_s > 0, f"no answer within {seconds} s"
            if select.select([self.process.stdout], [], [], left_s)[0]:
                more = os.read(self.process.stdout.fileno(), 1 << 16)
                assert more, "the rank ended"
                self._unread += more
        line, _, self._unread = self._unread.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, do: str, *, seconds: float = ANSWER_S, **what: object) -> dict[str, Any]:
        """Tell and wait."""
        self.tell(do, **what)
        return self.answer(seconds=seconds)

    def done(self, do: str, *, seconds: float = ANSWER_S, **what: object) -> Any:
        """Tell, wait, and demand that it went well; returns the result."""
        answer = self.ask(do, seconds=seconds, **what)
        assert "error" not in answer, answer
        return answer["result"]


def die_in_copy(_: Capture, target: memoryview) -> None:
    """Half of a copy, then SIGKILL."""
    target[: len(target) // 2] = bytes(len(target) // 2)
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """The rank's side."""
    options = json.loads(sys.argv[1])
    rank, world = options["rank"], options["world"]
    if world > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{options['meet']}", rank=rank, world_size=world
        )
    state = torch.zeros(options["size_bytes"] // 8, dtype=torch.int64)

    def content(step: int) -> torch.Tensor:
        return torch.arange(state.numel()).mul_(step + 1).add_(rank)

    protector = Snapshotter({"state": state}, job=options["job"], every=options["every"], socket=options["socket"],
                            on_error=options["on_error"])  # fmt: skip

    def work(order: dict[str, Any]) -> Any:
        match order["do"]:
            case "restore":
                return protector.restore()
            case "step":
                protector.before_update()
                state.copy_(content(order["step"]))
                protector.step(order["step"])
                return protector.stats()
            case "die_in_copy":
                Capture.start = die_in_copy  # type: ignore[assignment,method-assign]  # the window is microseconds wide
                protector.before_update()
                state.copy_(content(order["step"]))
                protector.step(order["step"])
                return protector.before_update()
            case "wait":
                return protector.wait(timeout_s=order.get("timeout_s", 20.0))
            case "stats":
                return protector.stats()
            case "equal":  # whether the state is what it was at that step
                return bool(torch.equal(state, content(order["step"])))
            case "clear":
                return state.zero_() is None
            case "close":
                return protector.close()
            case "hello":
                return os.getpid()
        raise ValueError(order["do"])

    for line in sys.stdin.buffer:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                answer: dict[str, Any] = {"result": work(json.loads(line))}
            except Exception as error:  # noqa: BLE001  # told to the test
                answer = {"error": type(error).__name__, "text": str(error)}
        answer["warnings"] = [str(warning.message) for warning in caught]
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
