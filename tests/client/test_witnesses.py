"""A snapshot of replicas that were not equal is found out by what each rank kept of the others' parts."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from fake_ranks import as_rank
from holdfast.client.catalogue import read_heads
from holdfast.client.export import NOTE, write_checkpoint
from holdfast.client.fetched import Fetched, fetched
from holdfast.client.manifest import Manifest, Pool, TensorEntry, Witness
from holdfast.client.witnesses import acceptance, refusal, strangers, unequal
from memory_shards import Numbers, Source, staged
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def snapshot(*, drift: float) -> Fetched:
    """Three replicas, of which one had a layer otherwise."""
    shards = []
    for rank in range(3):
        with as_rank(rank, 3):
            torch.manual_seed(2)
            model = DistributedDataParallel(nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 3)))
            with torch.no_grad():
                model.module[0].weight += drift * (rank == 1)
            shards.append(staged({"model": model}, Numbers(rank, 3)))
    source = fetched(Source(shards), room_bytes=1 << 30)
    assert isinstance(source, Fetched)
    return source


def test_what_was_unequal_is_named_and_nothing_else() -> None:
    for drift, paths in ((0.0, []), (0.5, ["model/module.0.weight"])):
        source = snapshot(drift=drift)
        assert unequal(read_heads(source), source.read) == paths


@pytest.mark.filterwarnings(r"ignore:torch\.distributed is .*, assuming the intent")
def test_an_export_of_it_says_so_and_an_equal_one_is_whole(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match=r"model/module\.0\.weight was not equal on all replicas"):
        write_checkpoint(snapshot(drift=0.5), tmp_path / "odd", note={})
    assert json.loads((tmp_path / "odd" / NOTE).read_text())["unequal_replicas"] == ["model/module.0.weight"]
    write_checkpoint(snapshot(drift=0.0), tmp_path / "even", note={})
    assert "unequal_replicas" not in json.loads((tmp_path / "even" / NOTE).read_text())
    torch.manual_seed(2)
    expected = nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 3)).state_dict()
    live = {"model": {f"module.{name}": torch.zeros_like(value) for name, value in expected.items()}}
    dcp.load(live, checkpoint_id=tmp_path / "even", no_dist=True)
    assert all(torch.equal(live["model"][f"module.{name}"], value) for name, value in expected.items())


def test_a_witness_of_what_is_not_there_is_no_stranger() -> None:
    entry = TensorEntry(("m",), "uint8", (70,), None, 64, 70, lazy=True, sharding=None, pool=0)
    witnesses = (Witness(0, 0, 64, 128), Witness(0, 192, 64, 192), Witness(0, 128, 6, 256))
    manifest = Manifest(
        version=2, names=("m",), tensors=(entry,), meshes=(), payload_bytes=320, objects_capacity_bytes=0,
        pools=(Pool((0, 1), 0, 256, 0),), witnesses=witnesses,
    )  # fmt: skip
    seen = torch.zeros(320, dtype=torch.uint8).numpy()
    filled = torch.zeros(70, dtype=torch.uint8)
    assert strangers(manifest, lambda at, size: seen[at : at + size], [(entry, filled)]) == []
    filled[65] = 1
    assert strangers(manifest, lambda at, size: seen[at : at + size], [(entry, filled)]) == ["m"]
    assert strangers(manifest, lambda at, size: seen[at : at + size], []) == []


def test_words_name_the_first_and_count_the_others() -> None:
    assert "a/b (and 2 more) was not equal" in refusal(["a/b", "c", "d"], 3)
    assert 'replicated="none"' in refusal(["a/b"], 3)
    assert "a/b was not equal" in acceptance(["a/b"])
