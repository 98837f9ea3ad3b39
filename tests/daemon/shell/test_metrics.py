"""What is counted, and that the text is what Prometheus reads."""

import math
import re
from typing import Any

import pytest
from holdfast.daemon.core import actions, events
from holdfast.daemon.core.ledger import JobRecord, LedgerRecord
from holdfast.daemon.core.memory import Memory
from holdfast.daemon.shell.metrics import BUCKETS_S, METRICS, Meters
from holdfast.protocol import messages
from holdfast.protocol.ids import SnapshotId
from msgspec import structs

HELD = {"lost_bytes": 4, "rebuilt_bytes": 1}
STATUS: dict[str, Any] = {
    "verdict": "DEGRADED",
    "seen_by": "a",
    "nodes": [
        {"name": "a", "state": "up", "arena_bytes": 4096, "budget_bytes": 8192, "engine": "native",
         "worker_session": 2, "jobs": {"gpt": HELD}},
        {"name": "b", "state": "down", "arena_bytes": 0, "budget_bytes": 0, "engine": "",
         "worker_session": 0, "jobs": {}},
    ],
    "jobs": [{"name": "gpt", "committed_step": 7, "more_losses": None, "protect_s": 0.25, "digest_failures": 3,
              "snapshot_bytes": 100, "ranks": 2}],
}  # fmt: skip
SAMPLE = re.compile(r'^([a-z_]+)(?:\{((?:[a-z]+="[^"\\]*",?)*)\})? (\S+)$')


@pytest.fixture
def meters() -> Meters:
    return Meters(chunk_bytes=10, version="1.2.3", engine_detail="avx2")


def values(meters: Meters) -> dict[str, float]:
    found = {}
    for line in meters.text(STATUS).splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            found[name] = float(value)
    return found


def ledger(step: int, *given_up: int) -> LedgerRecord:
    job = JobRecord(
        name="gpt", attempt=1, current_layout_id=None, layouts=(), committed=SnapshotId(1, step), committed_layout_id=1,
        given_up=tuple(SnapshotId(1, one) for one in given_up), slots=(), closed=False,
    )  # fmt: skip
    return LedgerRecord(cluster="lab", epoch=1, node=0, incarnation=1, worker_session=1, jobs=(job,))


def test_every_line_is_a_sample_of_a_declared_metric(meters: Meters) -> None:
    meters.observe("holdfast_protect_seconds", 0.3, job="gpt")
    declared, kinds = set(), {}
    for line in meters.text(STATUS).splitlines():
        if line.startswith("# TYPE"):
            _, _, name, kind = line.split()
            kinds[name] = kind
        elif line.startswith("# HELP"):
            declared.add(line.split()[2])
        else:
            found = SAMPLE.match(line)
            assert found is not None, line
            name = re.sub("_(bucket|sum|count)$", "", found[1]) if found[1] not in kinds else found[1]
            assert kinds[name] == METRICS[name][0]
            assert math.isfinite(float(found[3]))
    assert declared == set(kinds) == set(METRICS)
    assert [name for name, (kind, _) in METRICS.items() if (kind == "counter") != name.endswith("_total")] == []


def test_the_status_becomes_gauges(meters: Meters) -> None:
    seen = values(meters)
    assert seen['holdfast_committed_step{job="gpt"}'] == 7
    assert 'holdfast_tolerable_losses{job="gpt"}' not in seen  # not known
    assert seen["holdfast_verdict"] == 1
    assert (seen['holdfast_node_up{node="a"}'], seen['holdfast_node_up{node="b"}']) == (1, 0)
    assert seen['holdfast_node_lost_bytes{node="a"}'] == 4
    assert seen['holdfast_memory_bytes{kind="budget"}'] == 8192
    assert seen['holdfast_memory_bytes{kind="process"}'] > 1 << 20
    assert seen['holdfast_build_info{version="1.2.3",engine="native"}'] == 1
    assert seen['holdfast_engine_info{engine="native",detail="avx2"}'] == 1
    assert seen['holdfast_digest_failures_total{job="gpt"}'] == 3


def test_what_is_made_up_for_is_counted(meters: Meters, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any("reprotect" in name for name in values(meters))
    row = {"nodes": ["b", "c"], "kept_by": [], "state": "failed", "done_chunks": 3, "total_chunks": 8, "problem": "x"}
    monkeypatch.setitem(STATUS["jobs"][0], "reprotection", row)
    found = values(meters)
    assert found['holdfast_reprotected_nodes{job="gpt"}'] == 2
    assert found['holdfast_reprotection_left_chunks{job="gpt"}'] == 5
    assert found['holdfast_reprotection_failed{job="gpt"}'] == 1


def test_commits_are_counted_once_and_timed(meters: Meters) -> None:
    meters.wrote(ledger(1), {"gpt": 0.0})  # taken up from a predecessor: not seen committing
    assert "holdfast_commits_total" not in str(values(meters))
    for step in (2, 2, 3):
        meters.wrote(ledger(step), {"gpt": 0.3})
    seen = values(meters)
    assert seen['holdfast_commits_total{job="gpt"}'] == 2
    assert seen['holdfast_protect_seconds_count{job="gpt"}'] == 2
    assert seen['holdfast_protect_seconds_bucket{job="gpt",le="0.25"}'] == 0
    assert seen['holdfast_protect_seconds_bucket{job="gpt",le="0.5"}'] == 2
    assert 0 <= seen['holdfast_commit_age_seconds{job="gpt"}'] < 60


def test_given_up_snapshots_are_counted_once(meters: Meters) -> None:
    for record in (ledger(1, 2), ledger(1, 2), ledger(1, 2, 3), ledger(4, 3)):
        meters.wrote(record, {})
    assert values(meters)['holdfast_abandoned_total{job="gpt"}'] == 2


def test_buckets_hold_what_is_at_most_their_bound(meters: Meters) -> None:
    for seconds in (0.0, BUCKETS_S[0], BUCKETS_S[0] * 1.01, 1e9):
        meters.observe("holdfast_slot_wait_seconds", seconds, job="gpt")
    seen = values(meters)
    assert seen['holdfast_slot_wait_seconds_bucket{job="gpt",le="0.001"}'] == 2
    assert seen['holdfast_slot_wait_seconds_bucket{job="gpt",le="0.0025"}'] == 3
    assert seen['holdfast_slot_wait_seconds_bucket{job="gpt",le="60.0"}'] == 3
    assert seen['holdfast_slot_wait_seconds_bucket{job="gpt",le="+Inf"}'] == 4


def test_a_wait_for_a_slot_is_from_asking_to_being_granted(meters: Meters) -> None:
    snapshot = SnapshotId(1, 5)
    granted = actions.ReplyClient(9, messages.Granted(job="gpt", snapshot=snapshot, slot=0, generation=1))
    meters.did(granted)  # nobody asked: nothing is timed
    meters.saw(events.ClientSaid(9, messages.Begin(job="gpt", snapshot=snapshot, role=0)))
    meters.did(granted)
    meters.saw(events.ClientSaid(9, messages.Begin(job="gpt", snapshot=snapshot, role=0)))
    meters.saw(events.ClientGone(9))
    meters.did(granted)
    assert values(meters)['holdfast_slot_wait_seconds_count{job="gpt"}'] == 1


def test_stalls_are_what_ranks_tell_with_their_next_snapshot_or_as_they_leave(meters: Meters) -> None:
    begin = messages.Begin(job="gpt", snapshot=SnapshotId(1, 5), role=0)
    meters.saw(events.ClientSaid(9, begin))  # of an earlier version: it does not tell
    assert "holdfast_stall_seconds_count" not in str(values(meters))
    meters.saw(events.ClientSaid(9, structs.replace(begin, stall_ns=200_000)))
    meters.saw(events.ClientSaid(9, messages.Leave(job="gpt", role=0, stall_ns=3_000_000)))
    seen = values(meters)
    assert seen['holdfast_stall_seconds_bucket{job="gpt",le="0.0001"}'] == 0
    assert seen['holdfast_stall_seconds_bucket{job="gpt",le="0.00025"}'] == 1
    assert seen['holdfast_stall_seconds_count{job="gpt"}'] == 2
    assert seen['holdfast_stall_seconds_sum{job="gpt"}'] == pytest.approx(0.0032)


def test_work_and_traffic_are_counted_in_bytes(meters: Meters) -> None:
    memory = Memory("gpt", 0, 1)
    meters.worked(actions.VerifyChunks(memory, 1, 0, (1, 2, 3)), 0.5)
    meters.worked(actions.DigestChunks(memory, SnapshotId(1, 1), 0, 2), 0.25)
    meters.saw(events.PeerRefused(None, "key", "a stranger", by_us=True))
    meters.saw(events.PeerRefused(1, "key", "it refuses us", by_us=False))
    seen = values(meters)
    assert seen['holdfast_work_bytes_total{kind="verify"}'] == 30
    assert seen['holdfast_work_seconds_total{kind="verify"}'] == 0.5
    assert seen['holdfast_work_bytes_total{kind="digest"}'] == 20
    assert seen['holdfast_refused_total{reason="key"}'] == 1


def test_labels_are_bounded(meters: Meters, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.daemon.shell.metrics.LABEL_SETS_MAX", 2)
    for job in ("a", "b", "c"):
        meters.add("holdfast_commits_total", job=job)
        meters.observe("holdfast_protect_seconds", 1.0, job=job)
    assert 'job="b"' in meters.text(STATUS)
    assert 'job="c"' not in meters.text(STATUS)
