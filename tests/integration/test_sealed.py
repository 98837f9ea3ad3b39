"""Bulk mode `sealed` on real daemons: snapshots, losses and new keys go on as ever; strangers and other modes don't."""

import secrets
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import zmq
from holdfast.cli.keys import rotate_keys, write_keys
from holdfast.client import Snapshotter
from holdfast.protocol import frames, messages
from holdfast.protocol.config import parse_config
from holdfast.protocol.ids import SnapshotId
from local_cluster import DEADLINE_S, LocalCluster, free_ports, resident_bytes, until

MakeCluster = Callable[..., LocalCluster]
SIZE = 200_000  # int64 elements: 1.6 MB, 25 chunks of 64 KiB
CHUNK_BYTES = 64 << 10
RSS_SLACK_BYTES = 64 << 20
GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)
READY = b"\x05READY\x0bSocket-Type\x00\x00\x00\x04PUSH"


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Three nodes with keys that seal their chunks; each test leaves them well."""
    keys = tmp_path_factory.mktemp("sealed") / "keys"
    write_keys(keys, ["n0", "n1", "n2"])
    with LocalCluster(nodes=3, parity=1, keys_dir=keys, bulk="sealed") as cluster:
        cluster.start()
        yield cluster


def keys_of(cluster: LocalCluster) -> Path:
    return Path(parse_config(cluster.config.read_text(), origin="").config.keys_dir or "")


def content(step: int) -> torch.Tensor:
    return torch.arange(SIZE) * (step + 1)


def commit(cluster: LocalCluster, step: int, *, node: int = 0) -> None:
    snapshotter = Snapshotter({"s": content(step)}, job="gpt", socket=cluster.socket(node), on_error="raise")
    with snapshotter:
        snapshotter.step(step)
        snapshotter.wait(timeout_s=DEADLINE_S)


def restored(cluster: LocalCluster, *, node: int = 0) -> int | None:
    state = {"s": torch.zeros(SIZE, dtype=torch.int64)}
    with Snapshotter(state, job="gpt", socket=cluster.socket(node), on_error="raise") as snapshotter:
        step = snapshotter.restore()
    assert step is None or torch.equal(state["s"], content(step))
    return step


def test_a_sealed_cluster_survives_what_others_do(sealed: LocalCluster) -> None:
    """Another worker, the loss of the node that staged, and a commit on its replacement; no chunk is ever refused."""
    commit(sealed, 1)
    sealed.kill_worker(1)
    sealed.wait_up()
    commit(sealed, 2)
    sealed.kill(0)
    sealed.start([0])
    sealed.wait_status(lambda s: s["verdict"] == "HEALTHY" and len(s["jobs"]) == 1, "it is rebuilt")
    assert restored(sealed) == 2
    commit(sealed, 3)
    lines = [line for node in range(3) for line in sealed.log(node).splitlines() if "refuse" in line]
    assert not [line for line in lines if "has to wait until" not in line], "but a replacement that comes at once"


def test_strangers_on_the_bulk_port_get_nothing_and_cost_little(sealed: LocalCluster) -> None:
    commit(sealed, 5)
    worker = sealed.worker(0)
    before_bytes = resident_bytes(worker)
    port = int(sealed.log(0).rpartition("bulk port ")[2].split(",")[0])
    halves = [half_a_frame(port) for _ in range(100)]
    plain = messages.ChunkHeader("test", 1, 1, 1, "gpt", SnapshotId(1, 1), 1, "data", 0, reading=False)
    made_up = struct.pack(">BHQ8s", 1, 1, 1 << 40, secrets.token_bytes(8)) + secrets.token_bytes(60)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    stranger = context.socket(zmq.PUSH)
    stranger.setsockopt(zmq.LINGER, 0)
    stranger.setsockopt(zmq.SNDTIMEO, int(DEADLINE_S * 1000))
    stranger.connect(f"tcp://127.0.0.1:{port}")
    try:
        for parts in [[frames.encode(plain), bytes(CHUNK_BYTES)], [made_up, bytes(CHUNK_BYTES + 16)]] * 1000:
            stranger.send_multipart(parts)
        for words in (f"expected a header and {CHUNK_BYTES + 16} bytes", "expected the key agreed with node n1"):
            until(lambda words=words: words in sealed.log(0), f"{words!r} in the log")
        commit(sealed, 6)
        assert restored(sealed, node=1) == 6
    finally:
        stranger.close(0)
        context.term()
        for half in halves:
            half.close()
    assert sealed.worker(0) == worker
    assert resident_bytes(worker) < before_bytes + RSS_SLACK_BYTES


def half_a_frame(port: int) -> socket.socket:
    """A connection that says it will send a chunk, and stops in the middle."""
    raw = socket.create_connection(("127.0.0.1", port), timeout=5)
    ready = bytes([0x04, len(READY)]) + READY
    raw.sendall(GREETING + ready + b"\x02" + struct.pack(">Q", CHUNK_BYTES) + bytes(1000))
    return raw


def test_modes_that_differ_are_refused_by_name_on_both_sides(sealed: LocalCluster, make_cluster: MakeCluster) -> None:
    """A daemon with a listed key and another mode; its node 0 has an address of its own."""
    ports = [free_ports(1)[0], *sealed.ports[1:]]
    other = make_cluster(nodes=3, parity=1, ports=ports, keys_dir=keys_of(sealed), bulk="digest")
    other.start([0], wait=False)
    seen = other.wait_status(lambda s: s["nodes"][1]["state"] == "refused", "it hears that it is refused")
    said = "expected bulk mode 'sealed', found 'digest' on node 0; set security.bulk alike on all nodes"
    assert said in seen["nodes"][1]["reason"]
    assert said in sealed.wait_log(1, "we refuse a stranger: bulk:")
    sealed.wait_up()


def test_a_key_is_rotated_under_sealed_chunks(sealed: LocalCluster) -> None:
    """The next worker of a node agrees on new seals under its new key, and every snapshot is still there."""
    commit(sealed, 11)
    rotate_keys(keys_of(sealed), ["n1"])
    sealed.kill_worker(1)
    sealed.wait_up()
    assert restored(sealed, node=1) == 11
    commit(sealed, 12)
