"""What a node remembers: every stage, in order, on every node; bounded; and of a recovery as well."""

from itertools import pairwise

import pytest
from holdfast.daemon.core import actions, events
from holdfast.daemon.core.memory import Memory
from holdfast.daemon.core.trace import NODE, Trace
from holdfast.protocol import limits, messages
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.trace import STAGES, Span
from sim.cluster import Cluster, ClusterShape
from sim.network import NetworkFaults
from sim.ranks import JobShape

S = SnapshotId(1, 5)
SECOND_NS = 10**9


def small_cluster() -> Cluster:
    """Three nodes, parity 1, a rank on two of them; the third holds parity only."""
    job = JobShape("a", ((0, 100), (1, 65)), every=1, step_s=1.0)
    network = NetworkFaults(delay_s=0.001, delay_s_max=0.001)
    cluster = Cluster(1, ClusterShape(node_count=3, parity=1, group_size=3, jobs=(job,), network=network))
    cluster.start()
    return cluster


def remembered(cluster: Cluster, node: int, step: int) -> dict[tuple[str, int], Span]:
    """A node's spans of one step by stage and rank, on the simulation's own clock."""
    worker = cluster.machines[node].worker
    assert worker is not None
    ahead_ns = cluster.machines[node].clock_offset_ns
    return {
        (span.stage, span.rank): Span(
            span.stage, span.job, span.snapshot, span.rank, span.start_ns - ahead_ns, span.end_ns - ahead_ns, span.count
        )
        for span in worker.node.trace.told(100).spans
        if span.snapshot is not None and span.snapshot.step == step
    }


def test_a_snapshot_goes_through_all_stages_in_order_on_all_nodes() -> None:
    cluster = small_cluster()
    job = cluster.jobs[0]
    assert cluster.world.run_until(lambda: job.committed is not None and job.committed.step == 2, deadline_s=60.0)
    commits = []
    for node in range(3):
        spans = remembered(cluster, node, 1)
        expected = {"digests", "receive", "encode", "protect", "facts", "commit"}
        if node < 2:
            expected |= {"begin", "stage", "seal", "digest", "send"}
        assert {stage for stage, _ in spans} == expected
        assert {rank for stage, rank in spans if stage in {"begin", "stage"}} == ({node} if node < 2 else set())
        own = {stage: span for (stage, _), span in spans.items()}
        for stage, span in own.items():
            assert stage in STAGES
            assert span.start_ns <= span.end_ns
        ordered = [own[stage] for stage in ("begin", "stage", "seal", "protect", "commit") if stage in own]
        for before, after in pairwise(ordered):
            assert before.end_ns <= after.end_ns
            assert before.end_ns <= after.start_ns or after.stage == "seal"
        if node < 2:
            for stage in ("digest", "send"):
                assert own["protect"].start_ns <= own[stage].start_ns <= own[stage].end_ns
            assert own["digest"].end_ns <= own["protect"].end_ns
            assert own["digest"].count == own["send"].count == 2  # of 64 bytes
        assert own["receive"].start_ns <= own["encode"].start_ns <= own["encode"].end_ns <= own["protect"].end_ns
        commits.append(own["commit"])
    facts = remembered(cluster, 0, 1)["facts", NODE]
    assert facts.count == 3, "the collector hears all"
    assert max(span.start_ns for span in commits) <= min(span.end_ns for span in commits), "no commit before all facts"


def test_a_lost_node_s_recovery_is_remembered_with_its_stages() -> None:
    cluster = small_cluster()
    job = cluster.jobs[0]
    assert cluster.world.run_until(lambda: job.committed is not None and job.committed.step == 1, deadline_s=60.0)
    cluster.lose_node(1, back_after_s=3.0)
    assert cluster.world.run_until(lambda: job.life == 2 and job.restored_all, deadline_s=120.0)
    assert job.restored is not None
    back = remembered(cluster, 1, job.restored.step)
    ordered = [back["digests", NODE], back["rebuild", NODE], back["verify", 1], back["restore", 1]]
    assert back["rebuild", NODE].end_ns <= back["verify", 1].end_ns <= back["restore", 1].start_ns
    assert [span.start_ns for span in ordered[:2]] == sorted(span.start_ns for span in ordered[:2])
    assert "decide" in {stage for stage, _ in remembered(cluster, 0, job.restored.step)}
    assert any(("sums", NODE) in remembered(cluster, node, job.restored.step) for node in (0, 2))


@pytest.fixture
def trace() -> Trace:
    return Trace(0)


def said(trace: Trace, now_ns: int, message: messages.ClientMessage) -> None:
    trace.saw(events.ClientSaid(9, message), now_ns)


def test_it_is_bounded_and_tells_how_much_it_forgot(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "TRACE_SPANS_KEPT", 10)
    for step in range(50):
        said(trace, step, messages.Begin("gpt", SnapshotId(1, step), 3))
    told = trace.told(100)
    assert [span.snapshot.step for span in told.spans if span.snapshot is not None] == list(range(40, 50))
    assert told.forgotten_count == 40
    assert len(trace.by_key) == len(trace.kept) == 10
    assert [span.start_ns for span in trace.told(2).spans] == [48, 49]
    assert trace.told(0).spans == ()


def test_a_second_time_through_a_stage_is_a_span_of_its_own(trace: Trace) -> None:
    arrived = events.ChunksDigested(Memory("gpt", 0, 1), S, 0, (1, 2, 3))
    for now_ns in (0, SECOND_NS, 100 * SECOND_NS):
        trace.saw(arrived, now_ns)
    assert [(span.start_ns, span.end_ns, span.count) for span in trace.told(1).spans] == [
        (0, SECOND_NS, 6),
        (100 * SECOND_NS, 100 * SECOND_NS, 3),
    ]


def test_how_a_stage_ended_is_noted(trace: Trace) -> None:
    said(trace, 1, messages.Begin("gpt", S, 3))
    trace.did(actions.ReplyClient(9, messages.Denied("Begin", "gpt", 7, "no room", snapshot=S)))
    said(trace, 2, messages.Begin("gpt", SnapshotId(1, 6), 3))
    trace.did(actions.ReplyClient(9, messages.Granted("gpt", SnapshotId(1, 6), 0, 1)))
    said(trace, 4, messages.Skip("gpt", SnapshotId(1, 6), 3, "torn " + "x" * 200))
    notes = {(span.stage, span.snapshot): span.note for span in trace.told(5).spans}
    assert notes["begin", S] == "refused: no room"
    assert notes["stage", SnapshotId(1, 6)].startswith("skipped: torn xx")
    assert notes["begin", SnapshotId(1, 6)] == ""
    assert max(map(len, notes.values())) == limits.TRACE_NOTE_CHARS_MAX


def test_questions_that_nobody_answers_are_forgotten(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CLIENT_COUNT_MAX", 4)
    for request in range(100, 120):
        trace.saw(events.PeerSaid(1, 1, messages.RestoreAsked("gpt", request)), request)
    said(trace, 200, messages.AskRestore("gpt"))
    assert len(trace.asking) <= 5
    trace.saw(events.ClientGone(9), 201)
    assert 9 not in {asked for _, asked in trace.asking}
