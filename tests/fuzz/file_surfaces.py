"""What is read back from files and from other processes: configs, keys, records, copies, and the heads of shards."""

import contextlib
import json
import random
import shutil
import tempfile
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
from fuzz.local_surfaces import timed
from fuzz.mutation import REPEATED_BYTES_MAX, TEXTS, Mutator
from fuzz.surface import Surface
from holdfast.client.catalogue import catalogue_of, read_heads
from holdfast.client.copies import copies, damage, place, write_digests
from holdfast.client.durable_places import choose
from holdfast.client.errors import HoldfastError
from holdfast.client.fetched import Fetched
from holdfast.client.manifest import HEADER_BYTES, parse_shard
from holdfast.client.ranks import Ranks
from holdfast.client.shard import ShardLayout
from holdfast.client.state_errors import ShardError
from holdfast.client.witnesses import unequal
from holdfast.daemon.core import events
from holdfast.daemon.shell.copying import Copier
from holdfast.protocol.config import ConfigError, config_digest, parse_config
from holdfast.protocol.failure_trace import read_trace
from holdfast.protocol.layout import Layout, ShardPlace
from holdfast.protocol.messages import RestoreAnswer
from holdfast.protocol.recovery import PhaseRecord, RecoveryRecord, StepRecord
from holdfast.protocol.trust import KEY_FILE_BYTES_MAX, read_key
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

CONFIGS = (
    """[cluster]
name = "llama"
parity = 2
group_size = 4
epoch = 3
[[node]]
name = "n0"
address = "10.0.0.1:7000"
domain = "rack1"
[[node]]
name = "n1"
address = "[fe80::1]:7000"
[[node]]
name = "n2"
address = "host.example:65535"
[memory]
budget = "64GiB"
slots = 2
chunk_bytes = "1MiB"
[security]
keys_dir = "/etc/holdfast/keys"
[http]
address = "127.0.0.1:9470"
""",
    """cluster = {name = "x", parity = 0}
node = [{name = "a", address = "127.0.0.1:1"}]
durable = {dir = "/copies", every_s = 10, keep = 3, after_lives = 2}
daemon = {socket = "/run/{node}.sock", engine = "auto", state_dir = "/var"}
scrub = {period_s = 60, bytes_per_s = "1GiB", cpu_percent = 5}
drill = {period_s = 0}
""",
)
KEY_FILES = (
    '#   ZeroMQ CURVE\nmetadata\ncurve\n    public-key = "' + "a" * 40 + '"\n    secret-key = "' + "b" * 40 + '"\n',
    'curve\n    public-key = "' + "Z" * 40 + '"\n',
)
TRACES = ("# hours,node\n0.5,3\n12.25 1\n\n100,0\n", "1e3,2\n1e4,2\n")


class Texts(Surface):
    """The cluster's config, key files, and a record of losses: what an operator writes or copies."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__("config and key files", draw)
        self.spoil = Mutator(draw)

    def make(self) -> bytes:
        kind = self.draw.choice("ccckt")
        seeds = {"c": CONFIGS, "k": KEY_FILES, "t": TRACES}[kind]
        return (kind + self.spoil.lines(self.draw.choice(seeds), seeds)).encode("utf-8", "surrogatepass")

    def feed(self, made: bytes) -> str:
        text = made[1:].decode("utf-8", errors="replace")
        flag = {"memory.budget": self.draw.choice(TEXTS)} if self.draw.random() < 0.1 else {}
        environment = {"HOLDFAST_CLUSTER_PARITY": self.draw.choice(TEXTS)} if self.draw.random() < 0.1 else {}
        with timed(self):
            try:
                match made[:1]:
                    case b"c":
                        config = parse_config(text, origin="x.toml", environment=environment, flags=flag).config
                        config_digest(config)
                        config.placement().report()
                    case b"k":
                        read_key(text[:KEY_FILE_BYTES_MAX])
                    case _:
                        read_trace(text, node_count=4)
            except ConfigError as error:
                return "config" if str(error) else "no reason"
            except ValueError as error:
                if made[:1] == b"c":
                    raise
                return "expected something else" if str(error) else "no reason"
        return ""


class Records(Surface):
    """The recovery record, and what a copying process tells of its copy: JSON."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__("records and reports", draw)
        self.spoil = Mutator(draw)
        record = RecoveryRecord(
            cluster="sim", epoch=1, node="n0", job="a", attempt=3, chosen=StepRecord(5, 2), lost_nodes=("n1",),
            refused=("step 6 (attempt 2) is not recoverable",), digest_before="0" * 16, digest_after=None,
            phases=(PhaseRecord("decide", "done", 0.5), PhaseRecord("rebuild", "done", 1.5, 100, 100)),
        )  # fmt: skip
        told = {"job": "a", "step": 5, "attempt": 2, "directory": "/c", "size_bytes": 10, "seconds": 0.5}
        self.seeds = (msgspec.json.encode(record), json.dumps(told).encode())
        self.heard: list[events.Event] = []
        self.copier = Copier(Path("/nowhere"), "n0", self.heard.append)

    def make(self) -> bytes:
        seed = self.draw.choice(self.seeds)
        if self.draw.random() < 0.5:
            return self.spoil.cut(seed, self.seeds)
        made = json.dumps(self.spoil.rewrite(json.loads(seed))).encode("utf-8", "surrogatepass")
        return made[:REPEATED_BYTES_MAX]

    def feed(self, made: bytes) -> str:
        self.heard.clear()
        with timed(self):
            with contextlib.suppress(msgspec.DecodeError, RecursionError, UnicodeDecodeError):
                msgspec.json.decode(made, type=RecoveryRecord)
                return ""
            code = self.draw.choice((0, 0, 0, 1))
            self.copier._watch("a", Said(made, code), 1.0)  # type: ignore[arg-type]  # a process that has ended
        assert len(self.heard) == 1
        return "" if isinstance(self.heard[0], events.DurablyCopied) else "copy failed"


class Said:
    """A process that has said something and ended."""

    def __init__(self, said: bytes, returncode: int) -> None:
        self.said, self.returncode = said, returncode

    def communicate(self, timeout: float | None = None) -> tuple[bytes, bytes]:
        """What it said, as it is and as a complaint."""
        del timeout
        return self.said, self.said


class Copies(Surface):
    """The names in a folder of durable copies, and the list of files that lies in one."""

    SEEDS = (b"copy-000001-step-5", b"copy-000002-step-900", b".n0.part", b".copy-000001-step-5.old", b".metadata")

    def __init__(self, draw: random.Random) -> None:
        super().__init__("durable copies", draw)
        self.spoil = Mutator(draw)
        self.root = Path(
            tempfile.mkdtemp(prefix="holdfast-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        )
        (self.root / "a" / "copy-000003-step-7").mkdir(parents=True)
        (self.root / "a" / "copy-000003-step-7" / ".metadata").write_bytes(b"")
        (self.root / "a" / "copy-000003-step-7" / "__0_0.distcp").write_bytes(bytes(100))
        self.table = write_digests(self.root / "a" / "copy-000003-step-7")
        self.listed = self.table.read_bytes()

    def _table(self) -> bytes:
        """The list of a copy's files and their digests, spoiled mostly."""
        return self.listed if self.draw.random() < 0.1 else self.spoil.cut(self.listed, (self.listed, *self.SEEDS))

    def make(self) -> bytes:
        return self.spoil.cut(self.draw.choice(self.SEEDS), self.SEEDS).replace(b"/", b"").replace(b"\0", b"")[:255]

    def feed(self, made: bytes) -> str:
        if made in {b"", b".", b".."}:
            return "no name"
        path = self.root / "a" / made.decode("utf-8", "surrogateescape")
        if self.draw.random() < 0.8:
            path.mkdir(exist_ok=True)
            (path / ".metadata").write_bytes(b"")
        else:
            path.write_bytes(b"")
        try:
            with timed(self):
                found = copies(self.root, "a")
                place(self.root, "a", step=9)
                choose(RestoreAnswer("a", 1, None, None, durable_dir=str(self.root), use_older=True))
                self.table.write_bytes(self._table())
                whole = not damage(self.table.parent)
            return "" if len(found) > 1 or whole else "not a copy"
        finally:
            if path.name != "copy-000003-step-7":
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def close(self) -> None:
        shutil.rmtree(self.root)


class Shards(Surface):
    """Heads of shards, as an export and a restore into another layout read them, and whole shards."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__("shards and exports", draw)
        self.spoil = Mutator(draw)
        self.seeds = (*(a_shard(rank) for rank in range(2)), *(a_share(rank) for rank in range(2)))

    def make(self) -> bytes:
        shard = self.draw.choice(self.seeds)
        if self.draw.random() < 0.5:
            return self.spoil.cut(shard[: HEADER_BYTES * 20], self.seeds) + shard[HEADER_BYTES * 20 :]
        return self._rewritten(shard)

    def _rewritten(self, shard: bytes) -> bytes:
        """The manifest as another valid one of the same length, where that is possible."""
        header, manifest, _, _ = parse_shard(memoryview(shard))
        plain = self.spoil.rewrite(msgspec.msgpack.decode(msgspec.msgpack.encode(manifest)))
        try:
            encoded = msgspec.msgpack.encode(plain)
        except (OverflowError, UnicodeError):
            return self.spoil.cut(shard, self.seeds)
        room = header.objects_offset - header.manifest_offset
        fits = encoded[:room]
        told = header._replace(manifest_bytes=len(fits))
        return told.pack() + fits.ljust(room, b"\0") + shard[header.objects_offset :]

    def feed(self, made: bytes) -> str:
        with timed(self):
            try:
                parse_shard(memoryview(made))
                whole = True
            except ShardError:
                whole = False
            try:
                source = Fetched(Layout((ShardPlace(0, len(made)),), 0, 1), (bytearray(made),))
                heads = read_heads(Bytes(made))
                catalogue_of(heads)
                unequal(heads, source.read)
            except (ShardError, HoldfastError) as error:
                return type(error).__name__
        return "" if whole else "head only"


class Bytes:
    """One rank's shard, as it is read by ranges."""

    def __init__(self, shard: bytes) -> None:
        self.shard = shard
        self.layout = Layout((ShardPlace(0, len(shard)),), 0, 1)

    def read_into(self, role: int, offset_bytes: int, target: memoryview, /) -> None:
        """What a daemon gives: only what lies inside the shard."""
        del role
        piece = self.shard[offset_bytes : offset_bytes + len(target)]
        if len(piece) != len(target):
            raise HoldfastError(f"{offset_bytes} + {len(target)} is beyond a shard of {len(self.shard)} bytes")
        target[:] = piece


def a_shard(rank: int) -> bytes:
    """What a rank with a small model stages."""
    torch.manual_seed(rank)
    return _staged(torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.LayerNorm(5)))


def a_share(rank: int) -> bytes:
    """What one of two replicas stages."""
    torch.manual_seed(1)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)
    try:
        model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.LayerNorm(5)))
        return _staged(model, Ranks(None))
    finally:
        dist.destroy_process_group()


def _staged(model: torch.nn.Module, ranks: Ranks | None = None) -> bytes:
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)  # a backward would ask the fake group to average it
    optimizer.step()
    layout = ShardLayout.build({"model": model, "optimizer": optimizer, "mask": torch.ones(2, 3).t()}, ranks=ranks)
    shard = bytearray(layout.shard_bytes)
    layout.capture().write(memoryview(shard))
    return bytes(shard)
