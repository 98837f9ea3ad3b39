"""Small copies within a GPU as one launch: every byte arrives, whatever the sizes and addresses, and none beside."""

import threading

import numpy as np
import pytest
import torch
from holdfast.client import moves
from holdfast.client.moves import ROW_BYTES_MAX, Moves

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_long_copies_are_cut_into_rows() -> None:
    rows = moves._rows([100, 5000], [7, 90_000], [10, 2 * ROW_BYTES_MAX + 3])
    cut = ROW_BYTES_MAX
    assert rows.tolist() == [
        [100, 7, 10], [5000, 90_000, cut], [5000 + cut, 90_000 + cut, cut], [5000 + 2 * cut, 90_000 + 2 * cut, 3],
    ]  # fmt: skip


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_without_cuda_there_is_no_kernel() -> None:
    assert Moves.of([1], [2], [3], torch.device("cuda", 0)) is None


class Room:
    """Random bytes on a GPU, a room for them, and a plan of copies that covers every alignment of both ends."""

    def __init__(self) -> None:
        chance = np.random.default_rng(4)
        sizes = [*chance.integers(1, 5000, 300), 1, 3, 4, 15, 16, 17, ROW_BYTES_MAX, ROW_BYTES_MAX + 1, 300_001]
        gaps = chance.integers(0, 33, (2, len(sizes)))
        self.sizes = [int(size) for size in sizes]
        self.starts = [(np.cumsum(np.array(sizes) + gap) - sizes).tolist() for gap in gaps]
        size_bytes = sum(self.sizes) + 40 * len(sizes)
        self.source = torch.randint(1, 255, (size_bytes,), dtype=torch.uint8, device="cuda")
        self.target = torch.zeros_like(self.source)

    def plan(self) -> Moves:
        bases = self.source.data_ptr(), self.target.data_ptr()
        sources, targets = ([base + at for at in starts] for base, starts in zip(bases, self.starts, strict=True))
        found = Moves.of(sources, targets, self.sizes, self.source.device)
        assert found is not None
        return found

    def wanted(self) -> torch.Tensor:
        wanted = torch.zeros_like(self.source)
        for source, target, size in zip(*self.starts, self.sizes, strict=True):
            wanted[target : target + size] = self.source[source : source + size]
        return wanted


@on_gpu
def test_every_byte_arrives_and_none_beside() -> None:
    room = Room()
    planned = room.plan()
    for _ in range(2):  # the second time with what is there by then
        assert planned.launch()
        assert torch.equal(room.target, room.wanted())
        room.source.random_(1, 255)


@on_gpu
def test_any_thread_and_any_stream_may_launch() -> None:
    room = Room()
    planned, wanted, found = room.plan(), room.wanted(), []

    def launch() -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            found.append(planned.launch())
        stream.synchronize()

    thread = threading.Thread(target=launch)
    thread.start()
    thread.join(30)
    assert found == [True]
    assert torch.equal(room.target, wanted)


@on_gpu
def test_a_driver_that_refuses_is_said_and_nothing_moves(caplog: pytest.LogCaptureFixture) -> None:
    room = Room()
    planned = room.plan()
    planned._row_count = 0  # an empty grid is refused
    assert not planned.launch()
    torch.cuda.synchronize()
    assert not room.target.any()
    assert "does not launch the gathering kernel" in caplog.text
