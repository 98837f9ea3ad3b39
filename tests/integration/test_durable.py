"""Durable copies by real daemons: made, thinned, killed in the middle, refused by their directory, begun from."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from holdfast.client import Snapshotter
from holdfast.client.copies import DIGESTS, copies, damage, place, write_digests
from local_cluster import LocalCluster, children, job_row, until

MakeCluster = Callable[..., LocalCluster]
TORCH_S = 90.0  # a process that imports torch on a busy machine

pytestmark = [pytest.mark.timeout(400), pytest.mark.filterwarnings("ignore::UserWarning")]


def durable(folder: Path, *, by_steps: int = 1, more: tuple[str, ...] = ()) -> tuple[str, ...]:
    return ("[durable]", f'dir = "{folder}"', "every_s = 0", f"every_steps = {by_steps}", *more)


def state_of(value: float) -> dict[str, Any]:
    model = torch.nn.Linear(30, 20)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.full((30,), value)).sum().backward()  # type: ignore[no-untyped-call]  # torch's own
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def commit(cluster: LocalCluster, state: dict[str, Any], step: int) -> None:
    with Snapshotter(state, job="job", socket=cluster.socket(0), on_error="raise") as job:
        job.restore()
        job.step(step)
        job.wait(timeout_s=20)


def wait_copied(cluster: LocalCluster, step: int, *, node: int = 0) -> None:
    def good() -> bool:
        return bool(job_row(cluster.try_status(node) or {"jobs": []}, "job").get("durable", {}).get("step") == step)

    until(good, f"step {step} is copied", seconds=TORCH_S)


def test_a_copy_is_whole_or_not_visible_and_is_begun_from_once_all_memory_is_lost(
    make_cluster: MakeCluster, tmp_path: Path
) -> None:
    root = tmp_path / "copies"
    cluster = make_cluster(nodes=2, parity=1, settings=durable(root))
    cluster.start()
    state = state_of(1.0)
    with pytest.warns(
        RuntimeWarning, match=r"memory holds nothing of job job, and .* is no directory on rank 0's host"
    ):
        commit(cluster, state, 3)
    worker = cluster.worker(0)
    copying = until(lambda: children(worker), "a copy is being made")
    os.kill(copying[0], signal.SIGKILL)
    cluster.wait_log(0, "no durable copy")
    assert copies(root, "job") == []
    wait_copied(cluster, 3, node=1)  # it is tried again, and all hear of it
    assert [copy.step for copy in copies(root, "job")] == [3]
    assert not list((root / "job").glob(".*.part"))
    path = copies(root, "job")[0].path
    assert (path / DIGESTS).is_file()
    assert damage(path) == ""
    told = cluster.command("status")
    assert "durable: step 3 was copied" in told.stdout
    for node in (0, 1):
        cluster.kill(node)
    cluster.start()
    fresh = state_of(2.0)
    with Snapshotter(fresh, job="job", socket=cluster.socket(1), on_error="raise") as job:
        with pytest.warns(RuntimeWarning, match="durable copy of step 3"):
            assert job.restore() == 3
        job.step(4)
        job.wait(timeout_s=20)
    for name, value in state["model"].state_dict().items():
        assert torch.equal(fresh["model"].state_dict()[name], value)
    moments = state["optimizer"].state_dict()["state"], fresh["optimizer"].state_dict()["state"]
    assert all(torch.equal(moments[0][index][key], moments[1][index][key]) for index in (0, 1) for key in moments[0][0])


def test_a_directory_that_can_not_be_written_stops_neither_training_nor_protection(
    make_cluster: MakeCluster, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    cluster = make_cluster(nodes=2, parity=1, settings=durable(tmp_path / "file" / "inside"))
    cluster.start()
    with Snapshotter(state_of(1.0), job="job", socket=cluster.socket(0), on_error="raise") as job:
        job.step(0)
        until(lambda: "can't be written" in cluster.log(0), "it is said", seconds=TORCH_S)
        job.step(1)
        job.wait(timeout_s=20)
    told = cluster.wait_status(lambda s: job_row(s, "job")["durable"]["failures"] > 0, "all know", node=1)
    assert job_row(told, "job")["committed_step"] == 1
    assert "FAILED" in cluster.command("status").stdout
    assert "no durable copy of job job" in cluster.command("check").stdout


def test_a_stop_waits_for_the_copy_of_what_is_committed_and_only_the_newest_stay(
    make_cluster: MakeCluster, tmp_path: Path
) -> None:
    root = tmp_path / "copies"
    for number in (1, 2):
        (root / "job" / f"copy-{number}-step-0").mkdir(parents=True)
        (root / "job" / f"copy-{number}-step-0" / ".metadata").touch()
    settings = durable(root, by_steps=0, more=("keep = 2", f"grace_s = {TORCH_S:.0f}"))
    cluster = make_cluster(nodes=2, parity=1, settings=settings)
    cluster.start()
    with Snapshotter(state_of(1.0), job="job", socket=cluster.socket(0), on_error="raise") as job:
        job.step(5)
        job.wait(timeout_s=20)
    cluster.wait_status(lambda s: s["jobs"][0]["committed_step"] == 5, "the other node knows", node=1)
    keepers = [cluster.keeper(node) for node in (0, 1)]
    for keeper in keepers:
        os.kill(keeper, signal.SIGTERM)
    for process in cluster.keepers.values():
        process.wait(2 * TORCH_S)
    assert [(copy.number, copy.step) for copy in copies(root, "job")] == [(2, 0), (3, 5)]


@pytest.mark.parametrize("spoil", ["truncated", "flipped", "gone"])
def test_a_newest_copy_that_can_not_be_read_gives_way_to_the_one_before(tmp_path: Path, spoil: str, kept: Path) -> None:
    root = tmp_path / "copies"
    shutil.copytree(kept, root)
    newest = copies(root, "job")[-1]
    file = max(newest.path.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if spoil == "gone":
        file.unlink()
    else:
        file.write_bytes(content if spoil == "flipped" else content[: len(content) // 2])
    with LocalCluster(nodes=1, parity=0, settings=durable(root, by_steps=0)) as cluster:
        cluster.start()
        fresh = state_of(3.0)
        with Snapshotter(fresh, job="job", socket=cluster.socket(0), on_error="raise") as job:
            with pytest.warns(RuntimeWarning) as said:
                assert job.restore() == 3
            texts = [str(warning.message) for warning in said]
            assert any("durable copy of step 4" in text and "can't be restored" in text for text in texts), texts
            assert any("restored from the durable copy of step 3" in text for text in texts), texts
    wanted = torch.load(kept.parent / "step3.pt", weights_only=True)
    for name, value in fresh["model"].state_dict().items():
        assert torch.equal(wanted[name], value)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two durable copies of a job, of steps 3 and 4, as a daemon leaves them; beside them what step 3 was."""
    root = tmp_path_factory.mktemp("durable") / "copies"
    for step in (3, 4):
        state = state_of(float(step))
        path = place(root, "job", step=step)
        dcp.save({name: item.state_dict() for name, item in state.items()}, checkpoint_id=path, no_dist=True)
        write_digests(path)
        if step == 3:
            torch.save(state["model"].state_dict(), root.parent / "step3.pt")
    return root
