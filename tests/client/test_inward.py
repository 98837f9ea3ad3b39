"""From a shard into live tensors: everything arrives, whoever watches versions hears of it, neighbours go together."""

import numpy as np
import pytest
import torch
from holdfast.client.inward import copy_all_in, runs
from holdfast.client.lanes import DEVICE_SMALL_BYTES
from holdfast.client.manifest import TensorEntry, align

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
