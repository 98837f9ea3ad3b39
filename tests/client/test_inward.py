"""From a shard into live tensors: everything arrives, whoever watches versions hears of it, neighbours go together."""

import numpy as np
import pytest
import torch
from holdfast.client import inward
from holdfast.client.checks import Checks
from holdfast.client.inward import copy_all_in, runs
from holdfast.client.lanes import DEVICE_SMALL_BYTES
from holdfast.client.manifest import TensorEntry, align
from holdfast.client.state_errors import RottenShardError
from holdfast.coding import chunk_digest

SIZES = [3, 70, DEVICE_SMALL_BYTES // 4, 5, 6]


def pairs() -> tuple[list[tuple[TensorEntry, torch.Tensor]], int]:
    found, offset = [], 0
    for index, count in enumerate(SIZES):
        entry = TensorEntry((f"t{index}",), "float32", (count,), None, offset, 4 * count, lazy=True, sharding=None)
        found.append((entry, torch.zeros(count)))
        offset += align(4 * count)
    return found, offset


@pytest.mark.parametrize("writable", [True, False])
def test_every_tensor_gets_its_bytes(writable: bool) -> None:
    mine, size_bytes = pairs()
    payload = np.random.default_rng(1).integers(0, 255, size_bytes, dtype=np.uint8)
    payload.flags.writeable = writable
    versions = [tensor._version for _, tensor in mine]
    copy_all_in(mine, payload)
    for (entry, tensor), version in zip(mine, versions, strict=True):
        assert tensor.numpy().tobytes() == payload[entry.offset : entry.offset + entry.size_bytes].tobytes()
        assert tensor._version > version


def test_small_neighbours_go_together_and_large_ones_alone() -> None:
    mine, _ = pairs()
    found = [[str(entry.path[0]) for entry, _ in run] for run in runs(list(reversed(mine)))]
    assert found == [["t0", "t1"], ["t2"], ["t3", "t4"]]


CHUNK_BYTES = 4096
HEAD_BYTES = 640  # of the shard, before its payload


def image_of(payload: np.ndarray[tuple[int], np.dtype[np.uint8]], offset_bytes: int) -> tuple[bytearray, Checks]:
    """A node's image with a shard that begins in mid-chunk, a neighbour's bytes around it, and what checks it."""
    shard = bytes(HEAD_BYTES) + payload.tobytes()
    image = bytearray(b"n" * offset_bytes + shard)
    image += b"n" * (-len(image) % CHUNK_BYTES)
    first = offset_bytes // CHUNK_BYTES
    chunks = [image[begin : begin + CHUNK_BYTES] for begin in range(0, len(image), CHUNK_BYTES)]
    last = -(-(offset_bytes + len(shard)) // CHUNK_BYTES)
    digests = [chunk_digest(bytes(chunk)) for chunk in chunks[first:last]]
    return image, Checks(memoryview(image), offset_bytes, CHUNK_BYTES, first, digests)


@pytest.mark.parametrize("offset_bytes", [0, 64, 5000])
@pytest.mark.parametrize("threads", [1, 3])
def test_each_chunk_is_compared_before_its_bytes_are_used(
    offset_bytes: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inward, "cores_of_rank", lambda: threads)
    monkeypatch.setattr(inward, "HOST_BLOCK_BYTES", 3 * CHUNK_BYTES)
    mine, size_bytes = pairs()
    payload = np.random.default_rng(1).integers(0, 255, size_bytes, dtype=np.uint8)
    image, checks = image_of(payload, offset_bytes)
    start = offset_bytes + HEAD_BYTES
    live = np.frombuffer(image, dtype=np.uint8)[start : start + size_bytes]
    copy_all_in(mine, live, checks, HEAD_BYTES)
    for entry, tensor in mine:
        assert tensor.numpy().tobytes() == payload[entry.offset : entry.offset + entry.size_bytes].tobytes()
    for place in (start, start + 300, start + size_bytes // 2, start + size_bytes - 1):
        image[place] ^= 1
        with pytest.raises(RottenShardError, match=f"chunk {place // CHUNK_BYTES} of"):
            copy_all_in(mine, live, checks, HEAD_BYTES)
        image[place] ^= 1
    image[0] ^= 1 if offset_bytes > CHUNK_BYTES else 0  # before the shard's first chunk: another rank's business
    copy_all_in(mine, live, checks, HEAD_BYTES)


def test_a_tensor_that_lies_out_of_order_is_filled_and_tied_ones_both() -> None:
    entry = TensorEntry(("t",), "float32", (3, 5), (1, 3), 0, 60, lazy=True, sharding=None)
    tied = TensorEntry(("u",), "float32", (3, 5), None, 0, 60, lazy=True, sharding=None)
    payload = np.arange(64, dtype=np.uint8)
    first, second = torch.zeros(5, 3).T, torch.zeros(3, 5)
    copy_all_in([(entry, first), (tied, second)], payload)
    assert first.contiguous().numpy().tobytes() == second.numpy().tobytes() == payload[:60].tobytes()
