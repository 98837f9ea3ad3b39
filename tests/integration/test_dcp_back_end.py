"""torch's checkpoints on real daemons as on any storage: what torch's own tests of back ends ask, in one process.

Written anew after them: torch's wheel does not hold those tests, so they don't run themselves.
Left out, since they ask for files: their names, their number per rank, threads that write them, compression of them,
`fsspec` paths, consolidation into one safetensors file, and metadata of each rank's own (`use_collectives=False`, which
is refused by name).
"""

import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from holdfast.client import Snapshotter
from holdfast.client.dcp import HoldfastReader, HoldfastWriter
from local_cluster import LocalCluster, job_row
from torch import nn

pytestmark = pytest.mark.filterwarnings(r"ignore:torch\.distributed is .*, assuming the intent")

COMMIT_S = 20.0


@pytest.fixture
def job() -> str:
    return f"job-{uuid.uuid4().hex[:12]}"


def state(value: float) -> dict[str, Any]:
    return {"w": torch.full((300, 100), value), "b": torch.full((7,), value).bfloat16(), "note": {"value": value}}


def blank() -> dict[str, Any]:
    return state(0.0)


def test_save_load_save_over_it_and_forward(cluster: LocalCluster, job: str) -> None:
    writer = HoldfastWriter(job=job, socket=cluster.socket(0))
    reader = HoldfastReader(job=job, socket=cluster.socket(1))
    loaded = []
    for value, checkpoint_id in ((1.0, "run/step-10"), (2.0, None), (3.0, "run/step-10"), (4.0, "run/step-4")):
        dcp.save(state(value), storage_writer=writer, checkpoint_id=checkpoint_id)
        live = blank()
        dcp.load(live, storage_reader=reader)
        assert torch.equal(live["w"], state(value)["w"])
        assert torch.equal(live["b"], state(value)["b"])
        assert live["note"] == {"value": value}
        loaded.append(reader.step)
    assert loaded == [10, 11, 10, 4]  # what is saved last is what is there, whatever its number
    future = dcp.async_save(state(5.0), storage_writer=writer)
    future.result(COMMIT_S)
    dcp.load(live, storage_reader=reader)
    assert (reader.step, live["note"]) == (5, {"value": 5.0})
    larger = {**state(6.0), "more": torch.ones(50_000), "text": "x" * 100_000}  # another layout: new memory
    dcp.save(larger, storage_writer=writer)
    live = {**blank(), "more": torch.zeros(50_000), "text": ""}
    dcp.load(live, storage_reader=reader)
    assert live["text"] == larger["text"]
    assert torch.equal(live["more"], larger["more"])
    writer.close()
    dcp.save(state(7.0), storage_writer=writer)  # attaches again
    dcp.load(live := blank(), storage_reader=reader)
    assert live["note"] == {"value": 7.0}
    writer.close()
    cluster.forget(job)


def test_a_module_and_its_optimizer_as_they_are(cluster: LocalCluster, job: str) -> None:
    """Objects with a state_dict are taken as they are; so is a whole snapshot that a Snapshotter staged."""
    model = nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(5)).sum().backward()
    optimizer.step()
    with Snapshotter({"model": model, "optimizer": optimizer}, job=job, socket=cluster.socket(0)) as snapshotter:
        snapshotter.step(3)
    fresh = nn.Linear(5, 3)
    fresh_optimizer = torch.optim.AdamW(fresh.parameters())
    fresh(torch.ones(5)).sum().backward()
    fresh_optimizer.step()  # so that there is room for its state
    reader = HoldfastReader(job=job, socket=cluster.socket(2))
    dcp.load({"model": fresh, "optimizer": fresh_optimizer}, storage_reader=reader, checkpoint_id="3")
    assert torch.equal(fresh.weight, model.weight)
    assert torch.equal(fresh_optimizer.state[fresh.bias]["exp_avg"], optimizer.state[model.bias]["exp_avg"])
    cluster.forget(job)


def test_ranks_that_moved_find_their_own(cluster: LocalCluster, job: str) -> None:
    """One rank, staged through node 0, back through node 2: everything as it was, random generators included."""
    data = torch.arange(70_000)
    with Snapshotter({"data": data}, job=job, socket=cluster.socket(0), on_error="raise") as snapshotter:
        torch.manual_seed(5)
        snapshotter.step(8)
    expected = torch.rand(3)
    live = torch.zeros_like(data)
    with Snapshotter({"data": live}, job=job, socket=cluster.socket(2), on_error="raise") as moved:
        assert moved.restore() == 8
        assert torch.equal(torch.rand(3), expected)
        assert torch.equal(live, data)
        moved.step(9)  # staged where the rank is now
        moved.wait(timeout_s=COMMIT_S)
    assert job_row(cluster.status(), job)["committed_step"] == 9
    cluster.forget(job)


def failure_of(save: Any) -> str:
    with pytest.raises(BaseException) as error:  # noqa: PT011  # torch's CheckpointException is a BaseException
        save()
    return str(error.value)


def test_failures_are_told_by_name_and_cost_only_that_save(cluster: LocalCluster, job: str, tmp_path: Path) -> None:
    writer = HoldfastWriter(job=job, socket=cluster.socket(0))
    dcp.save(state(1.0), storage_writer=writer)
    told = failure_of(lambda: dcp.save({"huge": torch.zeros(80 << 20, dtype=torch.int32)}, storage_writer=writer))
    assert "memory budget" in told
    assert "needed" in told
    told = failure_of(lambda: dcp.save({"odd": ValueError("x")}, storage_writer=writer))
    assert "odd: holds objects beyond torch's safe list" in told
    told = failure_of(lambda: dcp.save(state(1.0), storage_writer=writer, checkpoint_id="latest"))
    assert "expected a step's number" in told
    dcp.save(state(2.0), storage_writer=writer)
    live = blank()
    dcp.load(live, storage_reader=HoldfastReader(job=job, socket=cluster.socket(0)))
    assert live["note"] == {"value": 2.0}
    writer.close()
    absent = HoldfastWriter(job=job, socket=tmp_path / "absent.sock")
    assert "no daemon answers" in failure_of(lambda: dcp.save(state(1.0), storage_writer=absent))
    absent.close()
    reader = HoldfastReader(job="never-seen", socket=cluster.socket(0))
    assert "nothing of job 'never-seen' is committed" in failure_of(lambda: dcp.load(blank(), storage_reader=reader))
    cluster.forget(job)
