"""Bytes out of tensors and back, for every dtype and every way to lie in memory."""

import os

import numpy as np
import pytest
import torch
from holdfast.client import tensor_bytes
from holdfast.client.manifest import ITEM_BYTES
from holdfast.client.tensor_bytes import content, copy_in, copy_out, raw_bytes

LAYOUTS = {
    "in order": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.t(),
    "every other": lambda tensor: tensor[:, ::2],
    "scalar": lambda tensor: tensor[0, 0],
    "empty": lambda tensor: tensor[:0],
    "expanded": lambda tensor: tensor[:1].expand(3, -1),
}


def sample(dtype: torch.dtype) -> torch.Tensor:
    size = ITEM_BYTES[str(dtype).removeprefix("torch.")]
    raw = torch.arange(4 * 6 * size, dtype=torch.uint8)
    return (raw % 2 if dtype is torch.bool else raw).view(dtype).view(4, 6)


@pytest.mark.parametrize("name", sorted(ITEM_BYTES))
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_bytes_go_out_and_come_back(name: str, layout: str) -> None:
    tensor = LAYOUTS[layout](sample(getattr(torch, name)))
    expected = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    target = np.zeros(tensor.numel() * ITEM_BYTES[name], dtype=np.uint8)
    copy_out(tensor, raw_bytes(tensor), target)
    assert target.tobytes() == expected == content(tensor).tobytes()
    back = torch.zeros_like(tensor)
    copy_in(np.frombuffer(target.tobytes(), dtype=np.uint8), back)
    assert content(back).tobytes() == expected
    assert back.stride() == torch.zeros_like(tensor).stride()


def test_conjugated_views_give_the_values_that_are_seen() -> None:
    tensor = torch.tensor([1 + 2j, 3 - 4j]).conj()
    assert raw_bytes(tensor) is None
    assert content(tensor).tobytes() == np.array([1 - 2j, 3 + 4j], dtype=np.complex64).tobytes()


def test_raw_bytes_are_the_tensors_own_memory() -> None:
    tensor = torch.nn.Parameter(torch.zeros(2))
    raw = raw_bytes(tensor)
    assert raw is not None
    with torch.no_grad():
        tensor.fill_(1.0)
    assert raw.tobytes() == np.ones(2, dtype=np.float32).tobytes()


def test_copying_in_counts_as_a_change() -> None:
    for tensor in (torch.zeros(2, 2), torch.zeros(2, 2).t()):
        before = tensor._version
        copy_in(np.zeros(16, dtype=np.uint8), tensor)
        assert tensor._version > before


@pytest.mark.parametrize("threads", [1, 3])
def test_many_copies_arrive_on_one_thread_and_on_several(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_bytes, "threads_to_copy", lambda: threads)
    monkeypatch.setattr(tensor_bytes, "SPREAD_BYTES_MIN", 1000)
    monkeypatch.setattr(tensor_bytes, "BLOCK_BYTES", 333)
    sources = [np.random.default_rng(size).integers(0, 255, size, dtype=np.uint8) for size in (0, 1, 333, 334, 5000)]
    targets = [np.zeros_like(source) for source in sources]
    tensor_bytes.copy_all(list(zip(targets, sources, strict=True)))
    assert all(np.array_equal(*pair) for pair in zip(targets, sources, strict=True))


def test_copies_leave_half_of_the_cores_to_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert tensor_bytes.threads_to_copy() == tensor_bytes.THREADS_MAX
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert tensor_bytes.threads_to_copy() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert tensor_bytes.threads_to_copy() == 1
