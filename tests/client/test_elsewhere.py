"""Ranks that begin from durable copies take the same one, whichever of them finds the damage, or all refuse."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed.checkpoint as dcp
from holdfast.client.copies import write_digests
from holdfast.client.elsewhere import Elsewhere
from holdfast.client.errors import NotRecoverableError
from holdfast.client.ranks import Ranks
from holdfast.client.state_errors import RestoreMismatchError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
WORLD_SIZE = 3
WAIT_S = 30.0  # a rank that waits for one which went another way fails the test, late


class Meeting:
    """An exchange between threads: each brings its payload and gets everybody's."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(WORLD_SIZE, timeout=WAIT_S)
        self.payloads = [b""] * WORLD_SIZE

    def rank(self, rank: int) -> Ranks:
        meeting = self

        class Here:
            world_size = WORLD_SIZE

            def __init__(self) -> None:
                self.rank = rank

            def exchange(self, payload: bytes) -> list[bytes]:
                meeting.payloads[rank] = payload
                meeting.barrier.wait()
                found = list(meeting.payloads)
                meeting.barrier.wait()
                return found

        return cast("Ranks", Here())


@pytest.fixture
def copies(tmp_path: Path) -> list[tuple[str, int]]:
    for step in (1, 2):
        dcp.save({"s": torch.full((100,), float(step))}, checkpoint_id=tmp_path / f"{step}", no_dist=True)
        write_digests(tmp_path / f"{step}")
    return [(str(tmp_path / f"{step}"), step) for step in (2, 1)]


def restore(copies: list[tuple[str, int]], *, unfit: int = -1) -> list[tuple[Any, list[float], list[str]]]:
    """What each rank ends with: the copy or an error, its state, and what it said."""
    meeting = Meeting()

    def one(rank: int) -> tuple[Any, list[float], list[str]]:
        state, said = torch.zeros(101 if rank == unfit else 100), []
        elsewhere = Elsewhere({"s": state}, "gpt", Path("none"), ranks=meeting.rank(rank), allow_pickle=False)
        try:
            found: Any = elsewhere.restore_copies(copies, say=said.append)
        except (NotRecoverableError, RestoreMismatchError) as error:
            found = error
        return found, sorted(set(state.tolist())), said

    with ThreadPoolExecutor(WORLD_SIZE) as threads:
        return list(threads.map(one, range(WORLD_SIZE)))


def flip(directory: str) -> None:
    file = next(Path(directory).glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_damage_that_one_rank_finds_sends_all_to_the_copy_before(copies: list[tuple[str, int]]) -> None:
    assert [found[0] for found in restore(copies)] == [copies[0]] * WORLD_SIZE
    flip(copies[0][0])
    for found, state, said in restore(copies):
        assert found == copies[1]
        assert state == [1.0]
        assert len(said) == 1
        assert "durable copy of step 2" in said[0]
        assert "expected digest" in said[0]


def test_with_no_copy_left_all_are_named(copies: list[tuple[str, int]]) -> None:
    for directory, _ in copies:
        flip(directory)
    for found, state, _ in restore(copies):
        assert isinstance(found, NotRecoverableError)
        assert all(f"step {step}" in str(found) for step in (1, 2))
        assert state == [0.0], "nothing live was changed"


def test_a_state_that_does_not_fit_on_one_rank_ends_all(copies: list[tuple[str, int]]) -> None:
    for found, _, _ in restore(copies, unfit=1):
        assert isinstance(found, RestoreMismatchError)
        assert "[101] live" in str(found)
