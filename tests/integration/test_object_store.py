"""Durable copies and exports in an object store: a real server and real daemons; whole or not there, and begun from."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from holdfast.client import Snapshotter
from holdfast.client.copies import DIGESTS
from holdfast.client.durable_places import damage_of
from holdfast.client.object_copies import finish, folder_of, next_folder, object_copies, thin
from holdfast.client.objects import PART_BYTES, ObjectFolder, Objects
from local_cluster import LocalCluster, children, job_row, until
from s3_server import S3Server

MakeCluster = Callable[..., LocalCluster]
TORCH_S = 90.0  # a process that imports torch on a busy machine
PLACE = "s3://copies/of/lab"

pytestmark = [pytest.mark.timeout(400), pytest.mark.filterwarnings("ignore::UserWarning")]


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with S3Server(tmp_path) as server:
        for name, value in server.variables.items():
            monkeypatch.setenv(name, value)
        server.ask("PUT", "copies")
        yield server


def durable(*, by_steps: int = 1, more: tuple[str, ...] = ()) -> tuple[str, ...]:
    return ("[durable]", f'dir = "{PLACE}"', "every_s = 0", f"every_steps = {by_steps}", *more)


def state_of(value: float) -> dict[str, Any]:
    torch.manual_seed(int(value))
    model = torch.nn.Linear(300, 200)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.full((300,), value)).sum().backward()  # type: ignore[no-untyped-call]  # torch's own
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def wait_copied(cluster: LocalCluster, step: int) -> None:
    def good() -> bool:
        return bool(job_row(cluster.try_status() or {"jobs": []}, "job").get("durable", {}).get("step") == step)

    until(good, f"step {step} is copied", seconds=TORCH_S)


def test_objects_are_whole_or_not_there(s3: S3Server) -> None:
    objects = Objects(f"{PLACE}/")
    assert objects.names() == []
    content = os.urandom(PART_BYTES + 12345)
    with objects.write("a/large") as upload:
        buffer = bytearray(1 << 20)
        for start in range(0, len(content), len(buffer)):
            part = content[start : start + len(buffer)]
            buffer[: len(part)] = part
            upload.write(memoryview(buffer)[: len(part)])  # as torch does: the same memory again and again
        assert upload.tell() == len(content)
        assert not objects.exists("a/large")  # nothing of it can be seen while it is written
    objects.put("ab/small", b"x")
    assert [(row.name, row.size_bytes) for row in objects.names("a")] == [("a/large", len(content))]
    assert objects.digest("a/large") == upload.running.value
    assert objects.read("a/large", PART_BYTES - 5, 10).read() == content[PART_BYTES - 5 : PART_BYTES + 5]
    with pytest.raises(ArithmeticError):
        half_written(objects)
    objects.delete(["a/large", "never/there"])
    assert [row.name for row in objects.names()] == ["ab/small"]
    with pytest.raises(FileNotFoundError, match="s3://copies/of/lab"):
        objects.get("a/large")


def half_written(objects: Objects) -> None:
    with objects.write("a/failed") as upload:
        upload.write(b"half of it")
        raise ArithmeticError


def test_only_whole_copies_count_and_only_the_newest_stay(s3: S3Server) -> None:
    for step, node in ((10, "n0"), (20, "n1"), (5, "n0")):
        folder = next_folder(PLACE, "gpt", node=node)
        folder.put(".metadata", b"table")
        finish(folder, step=step)
    half = next_folder(PLACE, "gpt", node="n2")
    half.put("data", b"half")
    assert [(copy.number, copy.step) for copy in object_copies(PLACE, "gpt")] == [(1, 10), (2, 20), (3, 5)]
    assert object_copies(PLACE, "other") == []
    thin(PLACE, "gpt", keep=2)
    assert [copy.step for copy in object_copies(PLACE, "gpt")] == [20, 5]
    assert [row.name for row in half.files()] == ["gpt/copy-000004-n2/data"]  # somebody may be writing it
    assert not ObjectFolder(half.objects, "gpt/copy-000001-n0").files()
    assert next_folder(PLACE, "gpt", node="n2").files() == []


def test_a_copy_is_whole_or_not_visible_and_is_begun_from_once_all_memory_is_lost(
    s3: S3Server, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(nodes=2, parity=1, settings=durable(more=("keep = 2",)))
    cluster.start()
    states = {step: state_of(float(step)) for step in (3, 4)}
    for step, state in states.items():
        with Snapshotter(state, job="job", socket=cluster.socket(0), on_error="raise") as job:
            job.step(step)
            job.wait(timeout_s=20)
        if step == 3:
            copying = until(lambda: children(cluster.worker(0)), "a copy is being made")
            os.kill(copying[0], signal.SIGKILL)
            cluster.wait_log(0, "no durable copy")
            assert object_copies(PLACE, "job") == []
        wait_copied(cluster, step)
    assert [copy.step for copy in object_copies(PLACE, "job")] == [3, 4]
    newest = object_copies(PLACE, "job")[-1].place
    assert damage_of(newest) == ""
    assert f"{PLACE}" in cluster.log(0)
    for node in (0, 1):
        cluster.kill(node)
    cluster.start()
    flip(newest)
    fresh = state_of(9.0)
    with Snapshotter(fresh, job="job", socket=cluster.socket(1), on_error="raise") as job:
        with pytest.warns(RuntimeWarning) as said:
            assert job.restore() == 3
        texts = [str(warning.message) for warning in said]
        assert any("durable copy of step 4" in text and "expected digest" in text for text in texts), texts
        assert any(f"restored from the durable copy of step 3 in {PLACE}/job/copy-" in text for text in texts), texts
    for name, value in states[3]["model"].state_dict().items():
        assert torch.equal(fresh["model"].state_dict()[name], value)
    moments = states[3]["optimizer"].state_dict()["state"], fresh["optimizer"].state_dict()["state"]
    assert all(torch.equal(moments[0][index][key], moments[1][index][key]) for index in (0, 1) for key in moments[0][0])


def flip(place: str) -> None:
    """One bit of a copy's largest object is another one."""
    folder = folder_of(place)
    name = max(folder.files(), key=lambda row: row.size_bytes).name
    content = bytearray(folder.objects.get(name))
    content[len(content) // 2] ^= 1
    folder.objects.put(name, bytes(content))


@pytest.mark.parametrize("trouble", ["gone", "frozen", "denied"])
def test_a_store_in_trouble_stops_neither_training_nor_protection(
    make_cluster: MakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    strict = {"INITIAL_NO_AUTH_ACTION_COUNT": "1"} if trouble == "denied" else {}  # then it knows nobody's key
    with S3Server(tmp_path, environment=strict) as server:
        for name, value in server.variables.items():
            monkeypatch.setenv(name, value)
        server.ask("PUT", "copies")
        if trouble == "gone":
            monkeypatch.setenv("AWS_ENDPOINT", "http://127.0.0.1:1")
        cluster = make_cluster(nodes=2, parity=1, settings=durable())
        cluster.start()
        if trouble == "frozen":
            server.process.send_signal(signal.SIGSTOP)
        with Snapshotter(state_of(1.0), job="job", socket=cluster.socket(0), on_error="raise") as job:
            for step in range(3):
                job.step(step)
                job.wait(timeout_s=20)
            if trouble == "frozen":
                until(lambda: children(cluster.worker(0)), "a copy is being made")
                job.step(3)
                job.wait(timeout_s=20)
                server.process.send_signal(signal.SIGCONT)
                wait_copied(cluster, 3)
            elif trouble == "denied":
                until(lambda: f"{PLACE} can't be written" in cluster.log(0), "it is said", seconds=TORCH_S)
                assert "credentials" in cluster.log(0)
                told = cluster.wait_status(lambda s: job_row(s, "job")["durable"]["failures"] > 0, "all know", node=1)
                assert job_row(told, "job")["committed_step"] == 2
                assert "no durable copy of job job" in cluster.command("check").stdout


READER = """
import sys
sys.modules["holdfast"] = None
import io, obstore, torch, torch.distributed.checkpoint as dcp
from obstore.store import from_url
from pathlib import Path
store, folder = from_url(sys.argv[1]), Path(sys.argv[2])
for row in obstore.list(store).collect():
    (folder / row["path"]).write_bytes(obstore.get(store, row["path"]).bytes().to_bytes())
state = {"model": torch.nn.Linear(300, 200).state_dict()}
dcp.load(state, checkpoint_id=folder, no_dist=True)
torch.save(state["model"], sys.argv[2] + ".pt")
"""


def test_an_export_is_what_torch_reads_wherever_it_was_written_and_nothing_is_written_over(
    s3: S3Server, make_cluster: MakeCluster, tmp_path: Path
) -> None:
    cluster = make_cluster(nodes=2, parity=1)
    cluster.start()
    state = state_of(1.0)
    with Snapshotter(state, job="job", socket=cluster.socket(0), on_error="raise") as job:
        job.step(3)
        job.wait(timeout_s=20)
    done = cluster.command("export", "--to", "s3://copies/out/step-3", seconds=TORCH_S)
    assert done.returncode == 0, done.stderr
    assert "step 3 is in s3://copies/out/step-3" in done.stdout
    again = cluster.command("export", "--to", "s3://copies/out/step-3", seconds=TORCH_S)
    assert again.returncode == 2
    assert "is taken" in again.stderr
    wrong = cluster.command("export", "--to", "s3://nobody/has/this", seconds=TORCH_S)
    assert wrong.returncode == 2
    assert "s3://nobody/has/this can't be written" in wrong.stderr
    (tmp_path / "read").mkdir()
    read = [sys.executable, "-c", READER, "s3://copies/out/step-3", str(tmp_path / "read")]
    subprocess.run(read, check=True, timeout=TORCH_S, env={**os.environ, "AWS_ALLOW_HTTP": "true"})
    whole = torch.load(tmp_path / "read.pt")
    assert all(torch.equal(whole[name], value) for name, value in state["model"].state_dict().items())
    assert DIGESTS not in [row.name for row in Objects("s3://copies/out/step-3").names()]  # that is of copies
