"""Trainers that see no socket of the node: the same promises over the network, and no more rights than they need."""

import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import torch
import torch.distributed.checkpoint as dcp
import zmq
from holdfast.cli.keys import write_keys, write_trainer_keys
from holdfast.client import Snapshotter
from holdfast.client.dcp import HoldfastReader, HoldfastWriter
from holdfast.client.errors import DaemonUnreachableError, HoldfastError, RefusedError, SnapshotSkippedError
from holdfast.client.own_keys import VARIABLE
from holdfast.client.ranges import RangeReader
from holdfast.client.remote import RemoteLink
from holdfast.coding import chunk_digest
from holdfast.protocol import frames, limits, messages, remote_messages
from holdfast.protocol.exit_codes import ExitCode
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.layout import Layout, ShardPlace

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
from local_cluster import DEADLINE_S, LocalCluster, resident_bytes, until
from namespaces import Namespaces
from rank_process import RankProcess

T = TypeVar("T")
MakeCluster = Callable[..., LocalCluster]
MakeRank = Callable[..., RankProcess]
SIZE_BYTES = 24 << 20  # two dozen pieces
RSS_SLACK_BYTES = 48 << 20


def hiding(folder: Path) -> list[str]:
    """What to put before a command so that nothing of a folder is seen by it, as in another container."""
    script = f'mount -t tmpfs none {folder} && exec "$@"'
    return ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "-"]


@pytest.fixture
def with_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a cluster's keys; what a trainer is given of them is in the environment."""
    keys = tmp_path / "keys"
    write_keys(keys, ["n0", "n1"])
    write_trainer_keys(keys, ["trainer"])
    theirs = tmp_path / "theirs"
    shutil.copytree(keys, theirs, ignore=shutil.ignore_patterns("n*.key_secret"))
    (theirs / "trainers" / "trainer.key").unlink()
    monkeypatch.setenv(VARIABLE, str(theirs))
    return keys


def test_a_trainer_that_sees_nothing_of_the_node_is_killed_and_finds_its_state_bit_for_bit(
    make_cluster: MakeCluster, make_rank: MakeRank, with_keys: Path
) -> None:
    cluster = make_cluster(nodes=2, parity=1, keys_dir=with_keys, remote=True)
    cluster.start()
    hidden = hiding(cluster.folder)
    seen = subprocess.run([*hidden, "ls", cluster.folder], capture_output=True, timeout=DEADLINE_S, check=True)
    assert seen.stdout == b"", "it must see no socket for this to prove anything"
    rank = make_rank(socket=cluster.remote(0), job="gpt", inside=hidden, size_bytes=SIZE_BYTES)
    assert rank.done("restore") is None
    for step in range(3):
        rank.done("step", step=step)
    rank.done("wait")
    assert rank.done("stats")["transport"] == "zeromq"
    rank.done("step", step=3)  # on its way, or not
    rank.kill()
    again = make_rank(socket=cluster.remote(0), job="gpt", inside=hidden, size_bytes=SIZE_BYTES)
    step = again.done("restore")
    assert step in {2, 3}
    assert again.done("equal", step=step)
    again.done("step", step=step + 1)
    again.done("wait")
    assert "trainer at " in cluster.wait_log(0, "comes in over the network"), "the log names the key"
    assert again.done("close") is None


def test_one_job_over_both_ways_and_each_rank_comes_back_over_the_other(
    make_cluster: MakeCluster, make_rank: MakeRank, tmp_path: Path
) -> None:
    cluster = make_cluster(nodes=2, parity=1, remote=True)
    cluster.start()
    for life, sockets in enumerate([(cluster.socket(0), cluster.remote(1)), (cluster.remote(0), cluster.socket(1))]):
        ranks = [
            make_rank(
                socket=socket, job="mixed", rank=rank, world=2, meet=tmp_path / f"meet{life}", size_bytes=SIZE_BYTES
            )
            for rank, socket in enumerate(sockets)
        ]
        for order in ({"do": "restore"}, {"do": "equal", "step": 4}, {"do": "step", "step": 4 + life}, {"do": "wait"}):
            if life == 0 and order["do"] == "equal":
                continue
            for rank in ranks:
                rank.tell(**order)
            answers = [rank.answer() for rank in ranks]
            assert not any("error" in answer for answer in answers), (answers, cluster.log(0)[-2000:])
            if life == 1 and order["do"] in {"restore", "equal"}:
                assert [answer["result"] for answer in answers] == [4, 4] if order["do"] == "restore" else [True, True]
        assert {rank.done("stats")["transport"] for rank in ranks} == {"shared memory", "zeromq"}
        for rank in ranks:
            rank.kill()


class Training:
    """A training of this process, over the network."""

    def __init__(self, cluster: LocalCluster, *, strict: bool = True, stall_s: float = 5.0) -> None:
        self.state = torch.zeros(SIZE_BYTES // 8, dtype=torch.int64)
        self.last_step = 0
        self.snapshotter = Snapshotter(
            {"state": self.state}, job="gpt", socket=cluster.remote(0), max_stall_s=stall_s,
            on_error="raise" if strict else "warn",
        )  # fmt: skip

    def step(self, step: int) -> None:
        self.snapshotter.before_update()
        self.state.copy_(torch.arange(self.state.numel()).mul_(step + 1))
        self.snapshotter.step(step)

    def commit(self, step: int) -> None:
        self.step(step)
        self.snapshotter.wait(timeout_s=DEADLINE_S)

    def held_up_s(self) -> float:
        """How long the next step is held up."""
        self.last_step += 1
        before_s = self.snapshotter.stats()["stall_s"]["total"]
        self.step(self.last_step)
        return float(self.snapshotter.stats()["stall_s"]["total"] - before_s)

    def commit_in_time(self, first: int) -> int:
        """Step until something commits; returns that step."""

        def look() -> int:
            nonlocal first
            first += 1
            try:
                self.step(first)
                self.snapshotter.wait(timeout_s=3.0)  # one that was skipped never commits
            except HoldfastError:
                return 0
            return first

        return until(look, "a commit", seconds=2 * DEADLINE_S)


def test_a_worker_that_dies_amid_the_bytes_costs_that_snapshot_and_is_met_again(
    make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = make_cluster(nodes=2, parity=1, remote=True)
    cluster.start()
    training = Training(cluster)
    assert training.snapshotter.restore() is None
    training.commit(0)
    waited, await_moved = 0, RemoteLink._await_moved

    def kill_amid(link: RemoteLink, what: str) -> None:
        nonlocal waited
        waited += 1
        if waited == 5:
            cluster.kill_worker(0)
        await_moved(link, what)

    monkeypatch.setattr(RemoteLink, "_await_moved", kill_amid)
    with pytest.raises(SnapshotSkippedError, match=r"has ended|takes no messages"):
        training.commit(1)
    assert waited == 5, "the snapshot was whole before the worker died"
    assert training.commit_in_time(1) > 1
    with Snapshotter({"state": torch.zeros(1)}, job="other", socket=cluster.socket(0), on_error="raise") as other:
        assert other.restore() is None, "the node serves its own trainers, too"
    training.snapshotter.close()


def test_a_frozen_worker_holds_up_training_no_longer_than_its_bound(make_cluster: MakeCluster) -> None:
    """The connection ends by its heartbeats; tries to meet the worker again hold up nobody."""
    cluster = make_cluster(nodes=1, parity=0, remote=True)
    cluster.start()
    training = Training(cluster, strict=False, stall_s=1.0)
    training.snapshotter.restore()
    training.commit(0)
    cluster.signal_worker(0, signal.SIGSTOP)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        stalls = [training.held_up_s()]
        while training.snapshotter.stats()["attached"]:
            assert len(stalls) < 1000
            stalls.append(training.held_up_s())
        stalls += [training.held_up_s() for _ in range(20)]
        assert max(stalls) < 1.0 + 1.0 + 1.0, stalls  # the bound, its slack, a busy machine
        assert sum(stalls[-20:]) < 8.0, stalls  # not each of them up to the bound
        cluster.signal_worker(0, signal.SIGCONT)
        assert training.commit_in_time(100) > 100
        training.snapshotter.close()


@pytest.fixture
def hosts() -> Iterator[Namespaces]:
    """Two hosts with a link between them."""
    spaces = Namespaces(2)
    try:
        spaces.make()
    except (OSError, subprocess.SubprocessError) as error:
        spaces.remove()
        pytest.skip(f"needs network namespaces: {error}")
    yield spaces
    spaces.remove()


def test_a_trainer_of_another_host_goes_on_without_its_link_and_comes_back_with_it(
    make_cluster: MakeCluster, make_rank: MakeRank, with_keys: Path, hosts: Namespaces
) -> None:
    host = hosts.addresses[0].partition(":")[0]
    settings = ("[trainers]", f'address = "{host}:7500"')
    cluster = make_cluster(
        nodes=1, parity=0, keys_dir=with_keys, addresses=hosts.addresses[:1], inside=hosts.inside, settings=settings
    )
    cluster.start()
    there = {"socket": f"tcp://n0@{host}:7500", "job": "gpt", "inside": hosts.inside(1), "on_error": "warn"}
    rank = make_rank(**there)
    assert rank.done("restore") is None
    rank.done("step", step=0)
    rank.done("wait")
    hosts.unplug(1)
    for step in range(1, 20):
        rank.done("step", step=step)
    until(lambda: not rank.done("stats")["attached"], "its end of the link is known")
    until(lambda: "over the network has gone" in cluster.log(0), "so is the daemon's")
    for step in range(20, 30):
        rank.done("step", step=step)
    stats = rank.done("stats")
    assert stats["committed_step"] == 0
    assert stats["stall_s"]["total"] < 20.0, "what the link costs is one bound, and no more with each step"
    hosts.plug(1)
    until(lambda: rank.done("stats")["attached"], "it is met again")

    def commits() -> bool:
        nonlocal step
        step += 1
        rank.done("step", step=step)
        return "error" not in rank.ask("wait", timeout_s=3.0)

    until(commits, "a commit")
    rank.kill()
    again = make_rank(**there)
    assert again.done("restore") == step
    assert again.done("equal", step=step)


def test_a_key_that_is_not_listed_is_refused_with_words_until_it_is(
    make_cluster: MakeCluster, with_keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = make_cluster(nodes=2, parity=1, keys_dir=with_keys, remote=True)
    listed = with_keys / "trainers" / "trainer.key"
    aside = listed.rename(tmp_path / "aside")
    cluster.start()

    def refusal() -> RefusedError:
        with pytest.raises(RefusedError) as caught:
            RangeReader(job="gpt", socket=cluster.remote(0), timeout_s=5.0)
        assert caught.value.exit_code == ExitCode.WRONG_CLUSTER
        return caught.value

    assert "does not list this trainer's key (" in str(refusal())
    with (
        Snapshotter({"x": torch.zeros(1)}, job="gpt", socket=cluster.remote(0), on_error="raise") as strict,
        pytest.raises(DaemonUnreachableError, match=r"Copy its .*key file to the folder trainers of keys_dir"),
    ):
        strict.restore()
    assert "is not in" in cluster.wait_log(0, "a trainer is not let in")
    theirs = tmp_path / "theirs"
    (theirs / "n0.key").write_text((theirs / "n1.key").read_text())
    assert "refuse each other: expected the key that $HOLDFAST_KEYS_DIR lists for that node" in str(refusal())
    monkeypatch.delenv(VARIABLE)
    assert "refuse each other" in str(refusal())
    monkeypatch.setenv(VARIABLE, str(theirs))
    shutil.copy(with_keys / "n0.key", theirs)
    shutil.copy(aside, listed)

    def let_in() -> bool:
        try:
            RangeReader(job="gpt", socket=cluster.remote(0), timeout_s=5.0).close()
        except RefusedError:
            return False
        return True

    until(let_in, "the key counts without a restart")
    listed.unlink()
    until(lambda: not let_in(), "a key that left the folder is not let in")


def test_nobody_listening_is_said_with_what_to_look_at(cluster: LocalCluster) -> None:
    with pytest.raises(
        DaemonUnreachableError, match=r"no daemon answers on tcp://.*expected one with trainers.address"
    ):
        RangeReader(job="gpt", socket=f"tcp://127.0.0.1:{cluster.ports[0] ^ 1}", timeout_s=0.5)
    with pytest.raises(DaemonUnreachableError, match=r"no daemon answers on tcp://nowhere.invalid"):
        RangeReader(job="gpt", socket="tcp://nowhere.invalid:1", timeout_s=0.5)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_torch_s_checkpoints_are_written_and_read_from_elsewhere(cluster: LocalCluster) -> None:
    state = {"model": {"a": torch.arange(3 << 20), "b": torch.ones(7)}}
    dcp.save(state, storage_writer=HoldfastWriter(job="dcp", socket=cluster.remote(0)), checkpoint_id="step-3")
    found = {"model": {"a": torch.zeros(3 << 20, dtype=torch.int64), "b": torch.zeros(7)}}
    dcp.load(found, storage_reader=HoldfastReader(job="dcp", socket=cluster.remote(1)))
    assert torch.equal(found["model"]["a"], state["model"]["a"])
    assert torch.equal(found["model"]["b"], state["model"]["b"])
    cluster.forget("dcp")


# --- rights and floods -----------------------------------------------------------------------------------------------


class Stranger:
    """Says what it likes to a gate."""

    def __init__(self, port: int) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(f"tcp://127.0.0.1:{port}")

    def say(self, header: remote_messages.TrainerMessage, *bodies: bytes) -> None:
        self.socket.send_multipart([frames.encode(header), *bodies])

    def tell(self, message: messages.ClientMessage) -> None:
        self.say(remote_messages.Said(), frames.encode(message))

    def hear(self, kind: type[T]) -> T:
        """The next message of a kind, of the gate's or of the daemon's."""
        deadline_s = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline_s and self.socket.poll(1000):
            parts = self.socket.recv_multipart()
            header = frames.decode_gate(parts[0])
            said = frames.decode_daemon(parts[1]) if isinstance(header, remote_messages.Told) else header
            if isinstance(said, kind):
                return said
        raise AssertionError(f"no {kind.__name__}")

    def close(self) -> None:
        self.context.destroy(linger=0)


@pytest.fixture
def stranger(cluster: LocalCluster) -> Iterator[Stranger]:
    one = Stranger(cluster.remote_ports[0])
    one.say(remote_messages.Arrive())
    one.hear(remote_messages.Handed)
    yield one
    one.close()


def granted(one: Stranger, *, shard_bytes: int) -> tuple[messages.Granted, int]:
    """Whoever says the right words may stage: returns the grant, and where the shard begins."""
    layout = Layout((ShardPlace(1, 4096), ShardPlace(0, shard_bytes), ShardPlace(0, shard_bytes)), 0, 1)
    one.tell(messages.AskRestore("flood"))
    answer = one.hear(messages.RestoreAnswer)
    for role in (1, 2):  # all roles of a node have a place before any is granted a slot
        one.tell(messages.Plan("flood", answer.attempt, role, layout))
        accepted = one.hear(messages.PlanAccepted)
    snapshot = SnapshotId(answer.attempt, 0)
    one.tell(messages.Begin("flood", snapshot, 2))
    return one.hear(messages.Granted), accepted.offset_bytes


def put(grant: messages.Granted, number: int, offset: int, body: bytes) -> remote_messages.Put:
    digest = frames.pack_digests((chunk_digest(body),))
    return remote_messages.Put(number, grant.job, grant.slot, grant.generation, offset, digest)


@pytest.mark.parametrize(
    ("word", "bodies", "why"),
    [
        (remote_messages.Arrive(), (), "it has arrived already"),
        (remote_messages.Said(), (), "Said came with 0 bodies"),
        (remote_messages.Said(), (b"\xc1",), "malformed"),
        (remote_messages.Put(1, "a", 0, 1, 0, bytes(8)), (b"x",), "are not this trainer's to write now"),
        (remote_messages.Put(1, "a", 0, 1, 0, bytes(8)), (b"",), "expected 1 to 1048576 bytes at once, found 0"),
        (remote_messages.Get(1, "a", 0, 1, 0, 1), (), "are not lent to this trainer now"),
        (remote_messages.Said(), (frames.encode(messages.AskForget("a")),), "AskForget is for the command line"),
        (remote_messages.Said(), (b"x", b"y"), "expected 1 or 2 frames, found 3"),
    ],
)
def test_who_oversteps_is_let_go_with_the_reason(
    stranger: Stranger, word: remote_messages.TrainerMessage, bodies: tuple[bytes, ...], why: str
) -> None:
    stranger.say(word, *bodies)
    gone = stranger.hear(remote_messages.Gone)
    assert why in gone.text
    stranger.tell(messages.AskCommitted("a"))
    assert "is not known here" in stranger.hear(remote_messages.Gone).text


def test_a_trainer_writes_its_own_shard_only_and_only_until_its_seal(cluster: LocalCluster, stranger: Stranger) -> None:
    grant, start = granted(stranger, shard_bytes=1 << 20)
    stranger.say(put(grant, 1, start, b"mine"), b"mine")
    stranger.hear(remote_messages.PutDone)
    stranger.tell(messages.Seal("flood", grant.snapshot, 2))
    stranger.say(put(grant, 2, start, b"late"), b"late")
    assert "are not this trainer's to write now" in stranger.hear(remote_messages.Gone).text
    cluster.forget("flood")


@pytest.mark.parametrize("what", ["permitted", "not permitted", "unknown", "half"])
def test_a_flood_costs_a_daemon_no_memory(cluster: LocalCluster, what: str) -> None:
    one = Stranger(cluster.remote_ports[0])
    worker = cluster.worker(0)
    try:
        if what != "unknown":
            one.say(remote_messages.Arrive())
            one.hear(remote_messages.Handed)
        grant, start = messages.Granted("flood", SnapshotId(1, 0), 0, 1), 0
        if what == "permitted":
            grant, start = granted(one, shard_bytes=4 << 20)
        body = bytes(limits.REMOTE_PIECE_BYTES_MAX)
        word = put(grant, 1, start, body)
        one.socket.setsockopt(zmq.SNDTIMEO, 200)  # where the gate reads no more, we are held back, not it
        before_bytes = peak_bytes = resident_bytes(worker)
        for _ in range(512):
            try:
                if what == "half":
                    one.socket.send(frames.encode(word), zmq.SNDMORE)
                    break
                one.say(word, body)
            except zmq.Again:
                break
            peak_bytes = max(peak_bytes, resident_bytes(worker))
        until(lambda: cluster.try_status(0), "the daemon answers")
        peak_bytes = max(peak_bytes, resident_bytes(worker))
        assert peak_bytes < before_bytes + RSS_SLACK_BYTES
    finally:
        one.close()
    assert cluster.worker(0) == worker
    if what == "permitted":
        cluster.forget("flood")
