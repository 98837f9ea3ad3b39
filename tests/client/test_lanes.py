"""Packing and copying on one device: every byte arrives at its place, gaps are zero, few calls are made."""

import numpy as np
import pytest
import torch
from holdfast.client import lanes
from holdfast.client.lanes import HOST_PACK_BYTES_MAX, HOST_SMALL_BYTES, HostLane, Pack, Piece, piece
from holdfast.client.manifest import align
from hypothesis import given
from hypothesis import strategies as st

CPU = torch.device("cpu")
SIZES = st.sampled_from([1, 3, 63, 64, 65, 1000, HOST_SMALL_BYTES - 1, HOST_SMALL_BYTES, HOST_PACK_BYTES_MAX + 5])


def laid_out(tensors: list[torch.Tensor]) -> list[Piece]:
    found, offset = [], 0
    for tensor in tensors:
        size_bytes = tensor.numel() * tensor.itemsize
        found.append(piece(tensor, offset, size_bytes))
        offset += align(size_bytes)
    return found


def expected(tensors: list[torch.Tensor]) -> bytes:
    parts = [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors]
    return b"".join(part + bytes(align(len(part)) - len(part)) for part in parts)


@given(st.lists(SIZES, min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_every_byte_arrives_and_gaps_are_zero(sizes: list[int], chance: object) -> None:
    small = [size for size in sizes if size < HOST_SMALL_BYTES]
    large = [size for size in sizes if size >= HOST_SMALL_BYTES]
    tensors = [torch.randint(1, 255, (size,), dtype=torch.uint8) for size in (*small, *large)]
    wanted = expected(tensors)
    lane = HostLane(laid_out(tensors))
    for _ in range(2):  # the second finds what the first has left in the buffer
        payload = np.full(len(wanted), 0xFF, np.uint8)
        passage = lane.depart()
        passage.start(payload)
        assert passage.finished()
        assert payload.tobytes() == wanted


def test_small_tensors_are_gathered_in_groups_that_fit_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    gather = Pack.gather

    def counted(pack: Pack) -> None:
        calls.append(pack.end - pack.start)
        gather(pack)

    monkeypatch.setattr(Pack, "gather", counted)
    tensors = [torch.randn(256) for _ in range(1000)]  # 1 KiB each
    payload = np.zeros(1000 * 1024, np.uint8)
    HostLane(laid_out(tensors)).depart().start(payload)
    assert payload.tobytes() == expected(tensors)
    assert len(calls) == 4
    assert max(calls) <= HOST_PACK_BYTES_MAX


def test_what_lies_out_of_order_is_copied_in_order() -> None:
    image = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    tensors = [torch.randn(40, 50).t(), image, torch.randn(6).to(torch.complex64).conj()]
    payload = np.full(sum(align(t.numel() * t.itemsize) for t in tensors), 0xFF, np.uint8)
    HostLane(laid_out(tensors)).depart().start(payload)
    wanted = expected([tensor.resolve_conj().contiguous() for tensor in tensors])
    assert payload.tobytes() == wanted


def test_a_pack_sees_later_changes_of_its_tensors() -> None:
    tensors = [torch.zeros(3), torch.zeros(5, dtype=torch.float64)]
    pack = Pack(laid_out(tensors), CPU)
    for value in (1.0, 2.0):
        for tensor in tensors:
            tensor.fill_(value)
        pack.gather()
        assert pack.buffer.numpy().tobytes() == expected(tensors)
    assert pack.has_gaps


def test_what_is_small_depends_on_the_device() -> None:
    assert lanes.small_bytes(CPU) < lanes.small_bytes(torch.device("cuda", 0))
