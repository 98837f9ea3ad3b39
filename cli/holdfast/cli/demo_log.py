"""What the ranks of a run say: the JSON lines of their events file, read as they come.

Covers reading and keeping; which waits depend on it is of `demo_faults`, what it proves of `demo_report`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

READ_BYTES_MAX = 4 << 20  # in one look; a step's line of a rank is about 200 bytes


@dataclass(slots=True)
class RunLog:
    """One run of the training program, over all its restarts.

    Attributes:
        path: the events file.
        world_size: how many ranks there are.
        restart: how often the launcher has started the ranks anew; -1 until the first of them says something.
        pids: the processes of the newest start, by rank.
        step_of: the newest step of each rank since the newest start.
        restored: by rank, the step that was restored at the newest start.
        losses: by step, every loss that a rank reported, as hexadecimal text; one value each if all is well.
        hashes: by step and rank, every SHA-256 of a rank's state after that step.
        loss: the newest one, for people.
        stalls_s: seconds that protection held up training, of every step of every rank.
        ended: ranks that reached the end.
    """

    path: Path
    world_size: int
    restart: int = -1
    pids: dict[int, int] = field(default_factory=dict)
    step_of: dict[int, int] = field(default_factory=dict)
    restored: dict[int, int] = field(default_factory=dict)
    losses: dict[int, set[str]] = field(default_factory=dict)
    hashes: dict[tuple[int, int], set[str]] = field(default_factory=dict)
    loss: float | None = None
    stalls_s: list[float] = field(default_factory=list)
    ended: set[int] = field(default_factory=set)
    _offset: int = 0

    def read(self) -> None:
        """Take in what was appended since the last look. A line that is not whole yet waits for the next one."""
        if not self.path.exists():
            return
        with self.path.open("rb") as stream:
            stream.seek(self._offset)
            content = stream.read(READ_BYTES_MAX)
        whole_bytes = content.rfind(b"\n") + 1
        self._offset += whole_bytes
        for line in content[:whole_bytes].splitlines():
            self.take(json.loads(line))

    def take(self, event: Mapping[str, Any]) -> None:
        """Take in one event."""
        rank = int(event["rank"])
        match event["event"]:
            case "start":
                self._started(rank, pid=int(event["pid"]), restart=int(event["restart_count"]))
            case "restored":
                self.restored[rank] = int(event["step"])
                self.hashes.setdefault((int(event["step"]), rank), set()).add(str(event["sha256"]))
            case "step":
                self.step_of[rank] = int(event["step"])
                self.losses.setdefault(int(event["step"]), set()).add(str(event["loss_hex"]))
                self.loss = float(event["loss"])
                self.stalls_s.append(float(event["stall_s"]))
            case "hash":
                self.hashes.setdefault((int(event["step"]), rank), set()).add(str(event["sha256"]))
            case "end":
                self.ended.add(rank)
            case _:
                pass  # a newer training program may say more

    def _started(self, rank: int, *, pid: int, restart: int) -> None:
        if restart > self.restart:
            self.restart = restart
            self.pids, self.step_of, self.restored, self.ended = {}, {}, {}, set()
        self.pids[rank] = pid

    @property
    def all_started(self) -> bool:
        """Whether every rank of the newest start has said so."""
        return len(self.pids) == self.world_size

    @property
    def newest_step(self) -> int:
        """The newest step that any rank has finished since the newest start; -1 if none has."""
        return max(self.step_of.values(), default=-1)

    @property
    def step_of_all(self) -> int:
        """The newest step that every rank has finished since the newest start; -1 if there is none."""
        return min(self.step_of.values()) if len(self.step_of) == self.world_size else -1

    @property
    def restored_by_all(self) -> int | None:
        """The step that every rank has restored at the newest start; None until all have.

        Two ranks with two steps would be the worst of faults, which an assertion ends.
        """
        if len(self.restored) < self.world_size:
            return None
        assert len(set(self.restored.values())) == 1, f"a mix of steps was restored: {self.restored}"
        return next(iter(self.restored.values()))

    @property
    def restored_steps(self) -> list[int]:
        """All steps that were ever restored, and the last one that was hashed."""
        return sorted({step for step, _ in self.hashes})
