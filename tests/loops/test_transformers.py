"""A Hugging Face Trainer that is killed in mid-epoch goes on as if nothing had been. Run by `make loops-test`."""

import importlib
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from holdfast.cli.cluster import clean_environment
from holdfast.client import HoldfastError

pytestmark = [pytest.mark.loops, pytest.mark.timeout(330)]
LOOP = Path(__file__).parents[2] / "examples" / "transformers_loop.py"
RUN_S = 100.0  # a tenth of it on idle cores
STEPS = 42  # three epochs of 14; the last step of each has one batch, the others two
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# The text of the Trainer's state is missed where it is read ahead, as if the step had been committed just after it.
TOO_LATE = f"""
import runpy, sys
from holdfast.client.transformers import HoldfastCallback
HoldfastCallback._read_text = lambda self: ""
sys.argv[0] = {str(LOOP)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def lines_of(output: str) -> list[str]:
    """What the loop says: each batch's loss and each log to the last bit, and at the end a digest of its state."""
    return [line for line in output.splitlines() if line.startswith(("step ", "done "))]


def run(
    sockets: str, job: str, *options: str, program: tuple[str, ...] = (str(LOOP),), code: int = 0, folder: Path
) -> list[str]:
    added = {"HOLDFAST_SOCKET": sockets, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    added["TMPDIR"] = str(folder)
    done = subprocess.run(
        [sys.executable, *program, "--epochs", "3", "--job", job, *options],
        env=clean_environment(added),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
    )
    assert done.returncode == code, done.stderr[-3000:]
    return lines_of(done.stdout)


def step_of(line: str) -> int:
    return int(line.split()[1])


def check_goes_on(whole: list[str], before: list[str], after: list[str], kill_at: int) -> None:
    assert before == whole[: len(before)]
    assert step_of(before[-1]) == kill_at
    assert after == whole[-len(after) :]
    assert max(kill_at - 2, 1) <= step_of(after[0]) <= kill_at  # not from the beginning, and nothing is left out


@pytest.fixture(scope="module")
def whole(sockets: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    lines = run(sockets, "hf-whole", folder=tmp_path_factory.mktemp("whole"))
    batches = [step_of(line) for line in lines if " loss " in line and "logged" not in line]
    assert batches == [step for step in range(STEPS) for _ in range(1 if step % 14 == 13 else 2)]
    assert len([line for line in lines if "logged loss" in line]) == STEPS // 3
    assert lines[-1].startswith(f"done at step {STEPS}")
    return lines


# In the first epoch between two logs, on the first step of the second, and where evaluation has just run.
@pytest.mark.parametrize("kill_at", [4, 14, 20])
def test_a_killed_trainer_goes_on_bit_for_bit(sockets: str, whole: list[str], kill_at: int, tmp_path: Path) -> None:
    job = f"hf-killed-{kill_at}"
    before = run(sockets, job, "--kill-at", str(kill_at), code=-signal.SIGKILL, folder=tmp_path)
    after = run(sockets, job, folder=tmp_path)
    check_goes_on(whole, before, after, kill_at)
    assert not list(tmp_path.glob("holdfast-*"))  # what the Trainer resumed from is gone


def test_a_step_that_is_committed_while_a_trainer_begins_is_the_one_it_goes_on_from(
    sockets: str, whole: list[str], tmp_path: Path
) -> None:
    before = run(sockets, "hf-late", "--kill-at", "17", code=-signal.SIGKILL, folder=tmp_path)
    after = run(sockets, "hf-late", program=("-c", TOO_LATE), folder=tmp_path)
    check_goes_on(whole, before, after, 17)


def test_a_training_that_is_done_stays_done(sockets: str, whole: list[str], tmp_path: Path) -> None:
    assert run(sockets, "hf-whole", folder=tmp_path) == whole[-1:]


def test_an_epoch_that_draws_its_order_is_read_in_that_order_again(sockets: str, tmp_path: Path) -> None:
    options = ("--sampling", "group_by_length")  # its sampler draws from torch's own generator
    whole = run(sockets, "hf-drawn", *options, folder=tmp_path)
    before = run(sockets, "hf-drawn-killed", *options, "--kill-at", "20", code=-signal.SIGKILL, folder=tmp_path)
    check_goes_on(whole, before, run(sockets, "hf-drawn-killed", *options, folder=tmp_path), 20)


def test_two_ranks_go_on_together(sockets: str, tmp_path: Path) -> None:
    program = (*TORCHRUN, str(LOOP))
    whole = run(sockets, "hf-ranks", program=program, folder=tmp_path)
    before = run(sockets, "hf-ranks-killed", "--kill-at", "9", program=program, code=1, folder=tmp_path)
    check_goes_on(whole, before, run(sockets, "hf-ranks-killed", program=program, folder=tmp_path), 9)


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_that_can_not_be_protected_is_refused(tmp_path: Path) -> None:
    ours = importlib.import_module("holdfast.client.transformers")
    theirs = importlib.import_module("transformers")  # not everybody who collects this file has it

    def trainer(**options: object) -> Any:
        arguments = theirs.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, **options)
        data = [{"x": torch.zeros(1)}]
        return theirs.Trainer(model=torch.nn.Linear(1, 1), args=arguments, train_dataset=data)

    with pytest.raises(HoldfastError, match="auto_find_batch_size"):
        ours.HoldfastCallback(job="refused").attach(trainer(auto_find_batch_size=True))
    protected = trainer()
    ours.HoldfastCallback(job="refused").attach(protected)
    with pytest.raises(HoldfastError, match="attached"):
        ours.HoldfastCallback(job="refused").attach(protected)
    loose = trainer()
    loose.add_callback(ours.HoldfastCallback(job="refused"))
    with pytest.raises(HoldfastError, match="attach"):
        loose.train()
