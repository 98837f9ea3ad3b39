"""The demonstration's training: real ranks under torchrun, started, killed and listened to.

Covers the launcher's command line and environment. The program is `holdfast.client.tiny_gpt`, started by its name:
this room never imports torch.
"""

import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from holdfast.cli import processes
from holdfast.cli.cluster import clean_environment, tail
from holdfast.cli.demo_log import RunLog
from holdfast.protocol.exit_codes import ExitCode, OperatorError

PROGRAM = "holdfast.client.tiny_gpt"
RESTARTS_MAX = 8  # of the launcher; the faults need two, what they bring about by chance a few more
MONITOR_S = 0.1  # how often the launcher looks after its ranks
END_S = 10.0  # the launcher ends within a second of its last rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One run to start.

    Attributes:
        name: of its files in the folder.
        folder: of the demonstration; must exist.
        ranks: how many.
        steps: to train.
        sockets: the daemons', as HOLDFAST_SOCKET takes them; None for a run without snapshots.
        hash_steps: after which the state is hashed, beside the last one.
    """

    name: str
    folder: Path
    ranks: int
    steps: int
    sockets: str | None = None
    hash_steps: tuple[int, ...] = ()


class Training:
    """A run of the training program. Ends with `kill`, or by itself."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.output = launch.folder / f"{launch.name}.log"
        self.log = RunLog(launch.folder / f"{launch.name}.events", launch.ranks)
        scratch = launch.folder / "scratch"  # the launcher leaves files in TMPDIR
        scratch.mkdir(exist_ok=True)
        with self.output.open("wb") as output:
            self._launcher = subprocess.Popen(
                _command(launch, self.log.path),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=launch.folder,
                env=_environment(launch, scratch),
                start_new_session=True,
            )

    @property
    def rank_pids(self) -> list[int]:
        """The processes that the launcher runs now."""
        return processes.children(self._launcher.pid)

    @property
    def living_count(self) -> int:
        """How many ranks run, of those that have said that they started."""
        return sum(processes.alive(pid) for pid in self.log.pids.values())

    def has_ended(self) -> bool:
        """Whether the launcher has ended well.

        Raises:
            OperatorError: it ended otherwise; with the end of what it said.
        """
        status = self._launcher.poll()
        if status not in {None, 0}:
            raise OperatorError(ExitCode.BUG, f"the training ended with status {status}; {tail(self.output)}")
        return status is not None

    def kill_ranks(self, ranks: list[int]) -> None:
        """SIGKILL to these ranks' processes."""
        living = set(self.rank_pids)  # by now a number could belong to somebody else
        processes.kill(self.log.pids[rank] for rank in ranks if self.log.pids[rank] in living)

    def kill(self) -> None:
        """End the launcher and its ranks."""
        if self._launcher.poll() is None:
            self._launcher.kill()
        processes.kill_all_using(self.log.path)
        self._launcher.wait(END_S)


def refuse_missing_torch() -> None:
    """Raises OperatorError (exit code 2) if torch is not installed."""
    if find_spec("torch") is None:
        raise OperatorError(
            ExitCode.USAGE,
            f"the demonstration trains with PyTorch, which is not installed for {sys.executable}; "
            "install it with: pip install 'holdfast[torch]'",
        )


def _command(launch: Launch, events: Path) -> list[str]:
    launcher = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={launch.ranks}",
        f"--max-restarts={RESTARTS_MAX}", f"--monitor-interval={MONITOR_S}", "-m", PROGRAM,
    ]  # fmt: skip
    options = ["--steps", str(launch.steps), "--events", str(events)]
    if launch.sockets is None:
        options.append("--no-snapshots")
    if launch.hash_steps:
        options += ["--hash-steps", ",".join(map(str, launch.hash_steps))]
    return launcher + options


def _environment(launch: Launch, scratch: Path) -> dict[str, str]:
    added = {
        "CUDA_VISIBLE_DEVICES": "",  # the demonstration is the same on every machine
        "GLOO_SOCKET_IFNAME": "lo",  # a machine whose own name leads nowhere has it too
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(scratch),
        # Without it a restarted rank may meet the store of the life before.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    if launch.sockets is not None:
        added["HOLDFAST_SOCKET"] = launch.sockets
    return clean_environment(added)
