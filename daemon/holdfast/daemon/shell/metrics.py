"""What a node counts and times, and the text in which Prometheus reads it.

Covers this node's counters and histograms, kept here from what the loop and the coding thread see, and the gauges of
the cluster's status. Names follow Prometheus's conventions: base units, `_total` for what only grows. The core counts
nothing for this: whoever does the work says so.
"""

import threading
import time
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.daemon.core import actions, events
from holdfast.daemon.core.ledger import LedgerRecord
from holdfast.protocol import messages

VERDICTS = ("HEALTHY", "DEGRADED", "UNPROTECTED", "LOST")
BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
STALL_BUCKETS_S = (0.0001, 0.00025, 0.0005, *BUCKETS_S)  # a good stall on a GPU is a fraction of a millisecond
LABEL_SETS_MAX = 1024  # of one metric; jobs and refusal codes are few, and nobody else names labels

# name -> (type, help). Every name that /metrics can show; dashboards and the manual are checked against it.
METRICS: dict[str, tuple[str, str]] = {
    "holdfast_build_info": ("gauge", "1, with the version and the coding engine of this node as labels."),
    "holdfast_engine_info": ("gauge", "1, with this node's coding engine and what is behind it as labels."),
    "holdfast_verdict": ("gauge", "0 healthy, 1 degraded, 2 unprotected, 3 lost."),
    "holdfast_node_up": ("gauge", "Whether a node is heard."),
    "holdfast_node_lost_bytes": ("gauge", "Bytes of the committed snapshot that a node should hold and does not."),
    "holdfast_node_rebuilt_bytes": ("gauge", "How many of the lost bytes a running rebuild has brought back."),
    "holdfast_committed_step": ("gauge", "Newest committed step."),
    "holdfast_commit_age_seconds": ("gauge", "Since this node last learned of a newer committed snapshot."),
    "holdfast_tolerable_losses": ("gauge", "Further node losses that every group survives."),
    "holdfast_reprotected_nodes": ("gauge", "Absent nodes that the others of their group make up for, or begin to."),
    "holdfast_reprotection_left_chunks": ("gauge", "Chunks still to be computed for that, over all nodes."),
    "holdfast_reprotection_failed": ("gauge", "1: a node that should make up for absent ones can't; status says why."),
    "holdfast_snapshot_bytes": ("gauge", "Bytes of the committed snapshot, over all ranks, without parity."),
    "holdfast_attached_ranks": ("gauge", "Training processes attached, over all nodes."),
    "holdfast_arena_bytes": ("gauge", "Memory reserved for snapshots and parity, by node."),
    "holdfast_memory_bytes": ("gauge", "Of this node: arena (reserved), budget (allowed), process (beside the arena)."),
    "holdfast_worker_session": ("gauge", "How many workers this node's memory has seen: a jump is a restart."),
    "holdfast_digest_failures_total": ("counter", "Chunks that failed their digest, over all nodes."),
    "holdfast_damaged_chunks": ("gauge", "Resting chunks known to be wrong now."),
    "holdfast_repaired_chunks_total": ("counter", "Resting chunks that were wrong and were repaired, over all nodes."),
    "holdfast_disagreeing_stripes_total": ("counter", "Stripes whose parity was not that of their data."),
    "holdfast_scrub_age_seconds": ("gauge", "Since a whole pass over resting memory ended, on the slowest node."),
    "holdfast_drill_proven_step": ("gauge", "Newest step that a drill proved to be recoverable."),
    "holdfast_drill_survives": ("gauge", "Node losses per group that it was proven to survive."),
    "holdfast_drill_age_seconds": ("gauge", "Since that was proven."),
    "holdfast_drill_failures": ("gauge", "What the last drills found wrong, over all nodes."),
    "holdfast_drill_rebuild_bytes_per_second": ("gauge", "Lost bytes rebuilt per second in that drill."),
    "holdfast_durable_step": ("gauge", "Step of the newest durable copy."),
    "holdfast_durable_age_seconds": ("gauge", "Since the newest durable copy was made."),
    "holdfast_durable_failures": ("gauge", "Durable copies that failed in a row."),
    "holdfast_commits_total": ("counter", "Snapshots that this node saw commit."),
    "holdfast_abandoned_total": ("counter", "Snapshots that this node gave up."),
    "holdfast_sent_bytes_total": ("counter", "Chunk bytes handed to the network, for parity and for rebuilds."),
    "holdfast_received_bytes_total": ("counter", "Chunk bytes that arrived."),
    "holdfast_work_bytes_total": ("counter", "Bytes worked on, by kind: digest, encode, add, store, verify, serve."),
    "holdfast_work_seconds_total": ("counter", "Busy seconds of the coding and memory threads, by kind."),
    "holdfast_refused_total": ("counter", "Frames and connections refused, by reason."),
    "holdfast_protect_seconds": ("histogram", "From a snapshot's seal to its commit."),
    "holdfast_slot_wait_seconds": ("histogram", "How long a rank waited for a slot to stage into."),
    "holdfast_stall_seconds": (
        "histogram",
        "How long a rank's training was held up, per snapshot, as this node's ranks tell.",
    ),
}


@dataclass(slots=True)
class _Histogram:
    counts: list[int]
    total: float = 0.0


Labels = tuple[tuple[str, str], ...]


class Meters:
    """This node's counters and histograms. Thread-safe: two threads count, a third one reads."""

    def __init__(self, *, chunk_bytes: int, version: str, engine_detail: str = "") -> None:
        self._chunk_bytes, self._version, self._engine_detail = chunk_bytes, version, engine_detail
        self._lock = threading.Lock()
        self._counters: dict[str, dict[Labels, float]] = {}
        self._histograms: dict[str, dict[Labels, _Histogram]] = {}
        self._committed_s: dict[str, float] = {}  # job -> when its newest commit was learned of
        self._committed: dict[str, object] = {}
        self._given_up: dict[str, set[object]] = {}
        self._begun_s: dict[tuple[int, str], float] = {}  # (client, job) -> when it asked for a slot

    def add(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Count."""
        assert METRICS[name][0] == "counter", name
        with self._lock:
            table = self._counters.setdefault(name, {})
            key = tuple(labels.items())
            if key in table or len(table) < LABEL_SETS_MAX:
                table[key] = table.get(key, 0.0) + amount

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """Put one duration into a histogram."""
        assert METRICS[name][0] == "histogram", name
        with self._lock:
            table = self._histograms.setdefault(name, {})
            key = tuple(labels.items())
            if key not in table and len(table) >= LABEL_SETS_MAX:
                return
            bounds_s = _buckets_of(name)
            histogram = table.setdefault(key, _Histogram([0] * (len(bounds_s) + 1)))
            histogram.counts[bisect_left(bounds_s, seconds)] += 1
            histogram.total += seconds

    # --- what the worker sees ---

    def saw(self, event: events.Event) -> None:
        """An event came in."""
        match event:
            case events.ChunkArrived():
                self.add("holdfast_received_bytes_total", self._chunk_bytes)
            case events.PeerRefused(_, code, _, True):
                self.add("holdfast_refused_total", reason=code)
            case events.ClientSaid(client, messages.Begin(job, stall_ns=stall_ns)):
                self._begun_s[client, job] = time.monotonic()
                self._stalled(job, stall_ns)
            case events.ClientSaid(_, messages.Leave(job, stall_ns=stall_ns)):
                self._stalled(job, stall_ns)
            case events.ClientGone(client):
                self._begun_s = {key: since for key, since in self._begun_s.items() if key[0] != client}
            case _:
                pass

    def _stalled(self, job: str, stall_ns: int | None) -> None:
        if stall_ns is not None:
            self.observe("holdfast_stall_seconds", stall_ns / 1e9, job=job)

    def did(self, action: actions.Action) -> None:
        """An action was carried out."""
        match action:
            case actions.SendChunk():
                self.add("holdfast_sent_bytes_total", self._chunk_bytes)
            case actions.ReplyClient(client, messages.Granted(job)):
                since_s = self._begun_s.pop((client, job), None)
                if since_s is not None:
                    self.observe("holdfast_slot_wait_seconds", time.monotonic() - since_s, job=job)
            case _:
                pass

    def worked(self, action: actions.Action, seconds: float) -> None:
        """The coding or memory thread was busy with an action for so long."""
        kind, chunks = _work_of(action)
        self.add("holdfast_work_seconds_total", seconds, kind=kind)
        self.add("holdfast_work_bytes_total", chunks * self._chunk_bytes, kind=kind)
        if isinstance(action, actions.ServeChunk):
            self.add("holdfast_sent_bytes_total", self._chunk_bytes)

    def wrote(self, record: LedgerRecord, protect_s: Mapping[str, float]) -> None:
        """The ledger changed: every commit and every snapshot given up is in it."""
        for job in record.jobs:
            if job.committed is not None and self._committed.get(job.name) != job.committed:
                first = job.name not in self._committed
                self._committed[job.name] = job.committed
                with self._lock:
                    self._committed_s[job.name] = time.monotonic()
                if protect_s.get(job.name):  # 0: taken up from a predecessor, or only heard of
                    self.observe("holdfast_protect_seconds", protect_s[job.name], job=job.name)
                if not first or protect_s.get(job.name):
                    self.add("holdfast_commits_total", job=job.name)
            fresh = set(job.given_up) - self._given_up.get(job.name, set())
            self._given_up[job.name] = set(job.given_up)
            if fresh:
                self.add("holdfast_abandoned_total", len(fresh), job=job.name)

    # --- the text ---

    def text(self, status: Mapping[str, Any]) -> str:
        """Everything in Prometheus's text format, version 0.0.4."""
        with self._lock:
            samples = {name: dict(table) for name, table in self._counters.items()}
            histograms = {
                name: {key: _Histogram(list(one.counts), one.total) for key, one in table.items()}
                for name, table in self._histograms.items()
            }
            now_s = time.monotonic()
            samples["holdfast_commit_age_seconds"] = {
                (("job", job),): now_s - since_s for job, since_s in self._committed_s.items()
            }
        own = next(node for node in status["nodes"] if node["name"] == status["seen_by"])
        samples["holdfast_build_info"] = {(("version", self._version), ("engine", own["engine"])): 1}
        detail = self._engine_detail.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")  # may hold a path
        samples["holdfast_engine_info"] = {(("engine", own["engine"]), ("detail", detail)): 1}
        for name, labels, value in _gauges(status, own):
            samples.setdefault(name, {})[labels] = value
        lines: list[str] = []
        for name, (kind, about) in METRICS.items():
            lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
            lines += [f"{name}{_braces(labels)} {value:.10g}" for labels, value in samples.get(name, {}).items()]
            for labels, histogram in histograms.get(name, {}).items():
                lines += _histogram_lines(name, labels, histogram)
        return "\n".join(lines) + "\n"


def _work_of(action: actions.Action) -> tuple[str, int]:
    """The kind of a piece of work, and how many chunks it reads."""
    match action:
        case actions.DigestChunks(count=count):
            return "digest", count
        case actions.EncodeParity(sources=sources):
            return "encode", len(sources)
        case actions.AddToSum(incoming=incoming, more=more):
            return "add", 1 + len(incoming) + len(more)
        case actions.StoreSum(own=own):
            return "store", 1 + len(own)
        case actions.VerifyChunks(digests=digests):
            return "verify", len(digests)
        case actions.ServeChunk():
            return "serve", 1
        case actions.Allocate():
            return "allocate", 0
        case _:
            return "other", 0


def _gauges(status: Mapping[str, Any], own: Mapping[str, Any]) -> Iterable[tuple[str, Labels, float]]:
    """The status, and this node's row in it, as (name, labels, value)."""
    yield "holdfast_verdict", (), VERDICTS.index(status["verdict"])
    for job in status["jobs"]:
        labels = (("job", job["name"]),)
        for name, key in (
            ("holdfast_committed_step", "committed_step"),
            ("holdfast_tolerable_losses", "more_losses"),
            ("holdfast_snapshot_bytes", "snapshot_bytes"),
            ("holdfast_attached_ranks", "ranks"),
            ("holdfast_digest_failures_total", "digest_failures"),
            ("holdfast_damaged_chunks", "damaged_chunks"),
            ("holdfast_repaired_chunks_total", "repaired_chunks"),
            ("holdfast_disagreeing_stripes_total", "disagreeing_stripes"),
            ("holdfast_scrub_age_seconds", "scrub_age_s"),
        ):
            if job.get(key) is not None:
                yield name, labels, job[key]
        drill = job.get("drill") or {}
        for name, key in (
            ("holdfast_drill_proven_step", "proven_step"),
            ("holdfast_drill_survives", "survives"),
            ("holdfast_drill_age_seconds", "age_s"),
            ("holdfast_drill_failures", "failures"),
            ("holdfast_drill_rebuild_bytes_per_second", "rebuild_bytes_per_s"),
        ):
            if drill.get(key) is not None:
                yield name, labels, drill[key]
        if (made_up := job.get("reprotection")) is not None:
            yield "holdfast_reprotected_nodes", labels, len(made_up["nodes"])
            yield "holdfast_reprotection_left_chunks", labels, made_up["total_chunks"] - made_up["done_chunks"]
            yield "holdfast_reprotection_failed", labels, made_up["state"] == "failed"
        durable = job.get("durable") or {}
        for name, key in (
            ("holdfast_durable_step", "step"),
            ("holdfast_durable_age_seconds", "age_s"),
            ("holdfast_durable_failures", "failures"),
        ):
            if durable.get(key) is not None:
                yield name, labels, durable[key]
    for node in status["nodes"]:
        labels = (("node", node["name"]),)
        yield "holdfast_node_up", labels, node["state"] == "up"
        yield "holdfast_arena_bytes", labels, node["arena_bytes"]
        yield "holdfast_node_lost_bytes", labels, sum(held["lost_bytes"] for held in node["jobs"].values())
        yield "holdfast_node_rebuilt_bytes", labels, sum(held["rebuilt_bytes"] for held in node["jobs"].values())
    yield "holdfast_worker_session", (), own["worker_session"]
    yield "holdfast_memory_bytes", (("kind", "arena"),), own["arena_bytes"]
    yield "holdfast_memory_bytes", (("kind", "budget"),), own["budget_bytes"]
    yield "holdfast_memory_bytes", (("kind", "process"),), resident_bytes()


def resident_bytes() -> int:
    """Memory of this process beside the arena (RssAnon), in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    return 0


def _buckets_of(name: str) -> tuple[float, ...]:
    return STALL_BUCKETS_S if name == "holdfast_stall_seconds" else BUCKETS_S


def _histogram_lines(name: str, labels: Labels, histogram: _Histogram) -> list[str]:
    lines, below = [], 0
    for bound, count in zip((*map(str, _buckets_of(name)), "+Inf"), histogram.counts, strict=True):
        below += count
        lines.append(f"{name}_bucket{_braces((*labels, ('le', bound)))} {below}")
    return [*lines, f"{name}_sum{_braces(labels)} {histogram.total:.10g}", f"{name}_count{_braces(labels)} {below}"]


def _braces(labels: Labels) -> str:
    # Job and node names, refusal codes and engines are letters, digits, '.', '_' and '-': nothing needs escaping.
    return "{" + ",".join(f'{key}="{value}"' for key, value in labels) + "}" if labels else ""
