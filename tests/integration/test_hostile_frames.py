"""Nonsense on every socket of a daemon: it is refused, and the daemon goes on serving within its memory."""

import contextlib
import random
import secrets
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import msgspec
import pytest
import torch
import zmq
from holdfast.client import Snapshotter
from holdfast.protocol import frames, limits, messages
from holdfast.protocol.config import ClusterConfig, NodeConfig, config_digest
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.layout import Layout, ShardPlace
from local_cluster import LocalCluster, resident_bytes, until

RSS_SLACK_BYTES = 64 << 20  # what a worker may keep after a storm: allocator caches and a few frames
GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)
READY = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x00"


def tcp(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=5)


def bulk_port(cluster: LocalCluster, node: int) -> int:
    line = cluster.wait_log(node, "bulk port")
    return int(line.partition("bulk port ")[2].split(",")[0])


@contextmanager
def unix(path: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as raw:
        raw.settimeout(5)
        raw.connect(path)
        yield raw


def quietly_send(raw: socket.socket, payload: bytes) -> None:
    with contextlib.suppress(OSError):  # refused in mid-sentence, which is fine
        raw.sendall(payload)


def ready_frame() -> bytes:
    return bytes([0x04, len(READY)]) + READY


def raw_attacks(seed: int) -> list[bytes]:
    dice = random.Random(seed)
    return [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        dice.randbytes(1),
        dice.randbytes(4096),
        GREETING[:10],  # half a handshake
        GREETING,
        GREETING + ready_frame() + b"\x02" + struct.pack(">Q", 1 << 62),  # says that it will send 4 EiB
        GREETING + ready_frame() + b"\x02" + struct.pack(">Q", 1 << 20) + bytes(1000),  # stops in mid-frame
        GREETING + ready_frame() + b"\x00\x05hello",
        GREETING + ready_frame() + b"\x01\x00" * 500 + b"\x00\x00",  # 500 empty parts
        GREETING + dice.randbytes(64),
    ]


def is_serving(cluster: LocalCluster, job: str) -> None:
    """The whole way: attach, stage, protect, commit, restore, forget."""
    state = torch.arange(1 << 16)
    for _ in range(2):
        snapshotter = Snapshotter({"state": state}, job=job, socket=cluster.socket(0), on_error="raise")
        restored = snapshotter.restore()
        snapshotter.step(0 if restored is None else restored + 1)
        snapshotter.wait(timeout_s=20)
        snapshotter.close()
    assert restored == 0
    cluster.forget(job)


@pytest.fixture
def unharmed(cluster: LocalCluster) -> Iterator[LocalCluster]:
    """The workers after the test are those of before, they serve, and they have not grown."""
    nodes = range(len(cluster.names))
    is_serving(cluster, "before")
    workers = [cluster.worker(node) for node in nodes]
    rss = [resident_bytes(worker) for worker in workers]
    yield cluster
    cluster.wait_up()
    assert [cluster.worker(node) for node in nodes] == workers, cluster.log(0)[-3000:]
    is_serving(cluster, "after")
    for worker, before_bytes in zip(workers, rss, strict=True):
        assert resident_bytes(worker) < before_bytes + RSS_SLACK_BYTES


def test_raw_bytes_on_every_port(unharmed: LocalCluster) -> None:
    ports = [unharmed.ports[0], bulk_port(unharmed, 0), unharmed.remote_ports[0]]
    kept = []  # half-open connections stay while the daemon is tested
    for port in ports:
        for payload in raw_attacks(port):
            raw = tcp(port)
            quietly_send(raw, payload)
            kept.append(raw)
    for payload in raw_attacks(1):
        with unix(f"{unharmed.socket(0)}.zmq") as raw:
            quietly_send(raw, payload)
    is_serving(unharmed, "meanwhile")
    for raw in kept:
        raw.close()


def test_the_door_ignores_what_is_said_to_it(unharmed: LocalCluster) -> None:
    dice = random.Random(2)
    for size in (1, 100, 60_000):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as raw:
            raw.settimeout(5)
            raw.connect(str(unharmed.socket(0)))
            assert isinstance(frames.decode_door(raw.recv(8192)), messages.Welcome)
            for _ in range(20):
                try:
                    raw.send(dice.randbytes(size))
                except OSError:
                    break
            assert unharmed.status()["verdict"] == "HEALTHY"


def test_a_crowd_at_the_door_is_bounded(unharmed: LocalCluster) -> None:
    crowd: list[socket.socket] = []

    def is_in(raw: socket.socket) -> bool:
        try:
            raw.connect(str(unharmed.socket(0)))
        except BlockingIOError:  # the kernel's queue at the door is full for the moment
            return False
        return True

    try:
        for _ in range(limits.CLIENT_COUNT_MAX + 20):
            raw = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            raw.settimeout(5)
            crowd.append(raw)
            until(partial(is_in, raw), "room in the queue at the door")
        until(lambda: "at most" in unharmed.log(0), "a refusal that names the limit")
    finally:
        for raw in crowd:
            raw.close()
    unharmed.wait_status(lambda status: status["verdict"] == "HEALTHY", "an answer after the crowd has gone")


@pytest.mark.parametrize("which", ["control", "bulk"])
def test_a_crowd_at_a_port_is_bounded_and_ends_nobody(unharmed: LocalCluster, which: str) -> None:
    """More connections than the process had descriptors would end it; those who are connected stay so."""
    port = unharmed.ports[0] if which == "control" else bulk_port(unharmed, 0)
    shut = f"port {port} ({which}): expected at most 134 connections"
    crowd = []
    try:
        for _ in range(600):
            raw = socket.socket()
            crowd.append(raw)
            raw.setblocking(False)
            raw.connect_ex(("127.0.0.1", port))
        unharmed.wait_log(0, shut)
        with pytest.raises(TimeoutError):
            socket.create_connection(("127.0.0.1", port), timeout=0.3).close()
        is_serving(unharmed, "meanwhile")
    finally:
        for raw in crowd:
            raw.close()
    until(lambda: "new ones are taken again" in unharmed.log(0).rpartition(shut)[2], "the port to open")
    tcp(port).close()


class Stranger:
    """Speaks ZeroMQ to a daemon's control port or client endpoint."""

    def __init__(self, endpoint: str, *, kind: int = zmq.DEALER, identity: bytes = b"") -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(kind)
        self.socket.setsockopt(zmq.LINGER, 2000)
        self.socket.setsockopt(zmq.SNDTIMEO, 5000)
        self.socket.setsockopt(zmq.RCVTIMEO, 5000)
        if identity:
            self.socket.setsockopt(zmq.ROUTING_ID, identity)
        self.socket.connect(endpoint)

    def __enter__(self) -> "Stranger":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        self.context.term()

    def refusal(self) -> messages.Refused:
        return frames.decode_refusal(self.socket.recv())


def config_digest_of(names: tuple[str, ...] = ("n0", "n1", "n2")) -> str:
    """The digest of the clusters that these tests start."""
    nodes = tuple(
        NodeConfig(name=name, host="127.0.0.1", port=1 + index, domain=name) for index, name in enumerate(names)
    )
    return config_digest(ClusterConfig(cluster_name="test", nodes=nodes, parity=1, chunk_bytes=64 << 10))


def envelope(
    cluster: str = "test", epoch: int = 1, node: int = 1, incarnation: int = 1, version: int = 1,
    body: bytes = b"\xc0", config: str | None = None,
) -> bytes:  # fmt: skip
    """A frame between daemons, with whatever is wanted wrong in it."""
    fields = {
        "version": version, "cluster": cluster, "epoch": epoch, "node": node, "incarnation": incarnation,
        "body": msgspec.Raw(body), "config": config_digest_of() if config is None else config,
    }  # fmt: skip
    return msgspec.msgpack.encode(fields)


def said(message: messages.PeerMessage, incarnation: int) -> bytes:
    """A message that claims to come from node 1."""
    return envelope(incarnation=incarnation, body=msgspec.msgpack.encode(message))


KNOWN = msgspec.msgpack.encode(messages.ReportWanted(1))


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        pytest.param(b"", "malformed", id="empty"),
        pytest.param(b"\xc1" * 100, "malformed", id="not-msgpack"),
        pytest.param(b"\x91" * 5000, "malformed", id="nested"),
        pytest.param(envelope()[:-1], "malformed", id="truncated"),
        pytest.param(b"\xda\xff\xff" + bytes(10), "malformed", id="shorter-than-it-says"),
        pytest.param(bytes(limits.CONTROL_FRAME_BYTES_MAX + 1), "oversized", id="oversized"),
        pytest.param(envelope(body=msgspec.msgpack.encode({"type": "Surprise"})), "unknown", id="unknown-tag"),
        pytest.param(envelope(version=99, body=KNOWN), "version", id="version"),
        pytest.param(envelope(cluster="other", body=KNOWN), "cluster", id="cluster"),
        pytest.param(envelope(epoch=9, body=KNOWN), "epoch", id="epoch"),
        pytest.param(envelope(config="0123", body=KNOWN), "config", id="config"),
        pytest.param(envelope(node=0, body=KNOWN), "node", id="own-index"),
        pytest.param(envelope(node=77, body=KNOWN), "node", id="unknown-node"),
        pytest.param(envelope(node=-1, body=KNOWN), "malformed", id="negative-node"),
        pytest.param(envelope(incarnation=-1, body=KNOWN), "malformed", id="negative-incarnation"),
    ],
)
def test_a_control_frame_is_refused_by_name(cluster: LocalCluster, frame: bytes, code: str) -> None:
    worker = cluster.worker(0)
    with Stranger(f"tcp://127.0.0.1:{cluster.ports[0]}") as stranger:
        stranger.socket.send(frame)
        refusal = stranger.refusal()
    assert refusal.code == code, refusal
    assert "n0" in refusal.text
    assert cluster.worker(0) == worker


def test_several_parts_are_refused(cluster: LocalCluster) -> None:
    with Stranger(f"tcp://127.0.0.1:{cluster.ports[0]}") as stranger:
        stranger.socket.send_multipart([KNOWN, KNOWN])
        assert stranger.refusal().code == "malformed"


def test_a_message_beyond_all_bounds_ends_its_connection_only(unharmed: LocalCluster) -> None:
    with Stranger(f"tcp://127.0.0.1:{unharmed.ports[0]}") as stranger:
        stranger.socket.setsockopt(zmq.LINGER, 0)
        for _ in range(20):
            stranger.socket.send(bytes(4 << 20))
        assert unharmed.status()["verdict"] == "HEALTHY"


def test_without_a_token_nobody_is_heard(unharmed: LocalCluster) -> None:
    endpoint = f"ipc://{unharmed.socket(0)}.zmq"
    for identity in (b"", secrets.token_hex(16).encode()):
        with Stranger(endpoint, identity=identity) as stranger:
            stranger.socket.send(frames.encode(messages.AskForget("before")))
            stranger.socket.setsockopt(zmq.RCVTIMEO, 200)
            with pytest.raises(zmq.Again):
                stranger.socket.recv()


def test_a_client_that_talks_nonsense_is_told_so(unharmed: LocalCluster) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as raw:
        raw.settimeout(5)
        raw.connect(str(unharmed.socket(0)))
        welcome = frames.decode_door(raw.recv(8192))
        assert isinstance(welcome, messages.Welcome)
        with Stranger(welcome.endpoint, identity=welcome.token.encode()) as stranger:
            for nonsense in (b"", b"\xc1", msgspec.msgpack.encode({"type": "Surprise"}), b"\x91" * 3000,
                             frames.encode(messages.NodeProtected("a", SnapshotId(1, 1), 0))):  # fmt: skip
                stranger.socket.send(nonsense)
                denied = frames.decode_daemon(stranger.socket.recv())
                assert isinstance(denied, messages.Denied)
                assert "refused" in denied.text


def _layouts() -> Iterator[Layout]:
    yield Layout(shards=(ShardPlace(77, 1 << 20),), first_step=0, every=1, version=5)
    yield Layout(shards=(ShardPlace(1, 1 << 50),), first_step=0, every=1, version=6)
    yield Layout(shards=(), first_step=0, every=1, version=7)
    yield Layout(shards=(ShardPlace(0, 0),), first_step=0, every=1, version=8)


def _lies() -> Iterator[messages.PeerMessage]:
    """What a peer with a key, or anybody where there are no keys, could say in the right form."""
    far = SnapshotId(limits.STEP_MAX, limits.STEP_MAX)
    for job, snapshot in (("live", SnapshotId(1, 1)), ("lies", SnapshotId(1, 0)), ("nobody", SnapshotId(1, 0))):
        yield messages.SnapshotOpened(job, snapshot)
        yield messages.DigestsAnnounced(job, snapshot, 1, 0, bytes(8 * 4096))
        for layout in _layouts():
            yield messages.LayoutAnnounced(job, 1, layout, current=True)
            yield messages.LayoutAnnounced(job, 1, layout, current=False)
            yield messages.RestoreDecided(job, 9, 2, snapshot, layout)
        yield messages.WantLayout(job, 5)
        yield messages.WantDigests(job, far)
        for node in (0, 1, 2, 77):
            yield messages.DigestsAnnounced(job, snapshot, node, 0, bytes(8))
            yield messages.DigestsAnnounced(job, snapshot, node, limits.STEP_MAX, bytes(8))
            yield messages.NodeProtected(job, snapshot, node)
            yield messages.NodeGaveUp(job, snapshot, node, "no")
        yield messages.SnapshotOpened(job, far)
        yield messages.SnapshotCommitted(job, far)
        yield messages.ReadChunk(job, snapshot, "parity", limits.STEP_MAX)
        yield messages.ReadChunk(job, snapshot, "data", 0)
        yield messages.ChunkUnavailable(job, snapshot, "data", 0, "no")
        yield messages.ChunkReply(job, snapshot, limits.STEP_MAX, ok=False)
        yield messages.RestoreAsked(job, 3)
        yield messages.RestoreDecided(job, 3, 4, far, None)
    yield messages.RebuildAsked(2)
    yield messages.RebuildAsked(77)
    yield messages.StatusWanted(3)
    yield messages.StatusGiven(3, {"verdict": 5})
    for index in range(limits.JOB_COUNT_MAX + 4):
        yield messages.LayoutAnnounced(f"filler{index}", 1, Layout(shards=(ShardPlace(1, 8),), first_step=0, every=1,
                                                                  version=1), current=True)  # fmt: skip
    yield messages.Refused("cluster", "you are wrong")


def test_lies_in_good_form_end_nobody(make_cluster: Callable[..., LocalCluster]) -> None:
    """Without keys anybody may claim to be a node: that can cost protection, and must not end a daemon."""
    cluster = make_cluster(nodes=3, parity=1)
    cluster.start()
    workers = [cluster.worker(node) for node in range(3)]
    incarnation = cluster.status()["nodes"][1]["incarnation"]
    live = Snapshotter({"state": torch.arange(1 << 16)}, job="live", socket=cluster.socket(0), on_error="raise")
    live.step(0)
    live.wait()
    halved = {
        "type": "DigestsAnnounced",
        "job": "live",
        "snapshot": [1, 1],
        "node": 1,
        "first_chunk": 0,
        "digests": b"7",
    }
    with Stranger(f"tcp://127.0.0.1:{cluster.ports[0]}") as stranger:
        opened = messages.SnapshotOpened("live", SnapshotId(1, 1))
        stranger.socket.send(said(opened, incarnation))
        stranger.socket.send(envelope(incarnation=incarnation, body=msgspec.msgpack.encode(halved)))
        assert stranger.refusal().code == "malformed"
        for lie in _lies():
            stranger.socket.send(said(lie, incarnation))
    until(lambda: "filler" in cluster.log(0), "the last lies are heard")
    cluster.wait_up()
    live.close()
    assert [cluster.worker(node) for node in range(3)] == workers, cluster.log(0)[-4000:]


def test_bulk_frames_of_strangers_are_refused(unharmed: LocalCluster) -> None:
    header = messages.ChunkHeader("test", 1, 1, 1, "before", SnapshotId(1, 1), 1, "data", 0, reading=False)
    chunk = bytes(64 << 10)
    cases: list[list[bytes]] = [
        [b""], [b"\xc1", chunk], [frames.encode(header)], [frames.encode(header), b"short"],
        [frames.encode(header), chunk, b"more"], [bytes(600), chunk],
        [frames.encode(msgspec.structs.replace(header, cluster="other")), chunk],
        [frames.encode(msgspec.structs.replace(header, epoch=9)), chunk],
        [frames.encode(msgspec.structs.replace(header, sender=77)), chunk],
        [frames.encode(msgspec.structs.replace(header, node=77)), chunk],
        [frames.encode(msgspec.structs.replace(header, chunk=limits.STEP_MAX)), chunk],
        [frames.encode(msgspec.structs.replace(header, reading=True)), chunk],
        [frames.encode(msgspec.structs.replace(header, kind="parity")), chunk],
        [frames.encode(header), chunk],
    ]  # fmt: skip
    with Stranger(f"tcp://127.0.0.1:{bulk_port(unharmed, 0)}", kind=zmq.PUSH) as stranger:
        for parts in cases * 20:
            stranger.socket.send_multipart(parts)
    until(lambda: "on the bulk plane" in unharmed.log(0), "a refusal in the log")


def test_a_flood_of_refusals_does_not_fill_the_log(cluster: LocalCluster) -> None:
    before_bytes = cluster.log_path(0).stat().st_size
    with Stranger(f"tcp://127.0.0.1:{cluster.ports[0]}") as stranger:
        for step in range(5000):
            stranger.socket.send(envelope(cluster=f"other{step}", body=KNOWN))
        stranger.socket.send(envelope(version=99, body=KNOWN))
        while stranger.refusal().code != "version":
            pass
    assert cluster.log_path(0).stat().st_size - before_bytes < 100_000
