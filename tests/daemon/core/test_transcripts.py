"""Conversations of a small cluster as text. A change of what is said shows as a diff of a file.

``pytest tests/daemon/core/test_transcripts.py --rewrite-transcripts`` writes them anew; read the diff, too.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from holdfast.daemon.core.memory import GENERATION_BITS
from holdfast.protocol import messages
from holdfast.protocol.ids import SnapshotId
from sim.cluster import Cluster, ClusterShape
from sim.network import NetworkFaults
from sim.ranks import JobShape

HERE = Path(__file__).parent / "transcripts"
DEADLINE_S = 60.0
_SHORTER: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"SnapshotId\(attempt=(\d+), step=(\d+)\)"), r"\2@\1"),  # step@attempt
    (re.compile(r"layout=Layout\(shards=\(.*?\)\), [^)]*\)"), "layout=..."),
    (re.compile(r"digests=b(?:'[^']*'|\"[^\"]*\")"), "digests=..."),
    (re.compile(r"fingerprint=b(?:'[^']*'|\"[^\"]*\")"), "fingerprint=..."),
    (re.compile(r"number=(\d+)"), lambda found: f"number={int(found[1]) % (1 << 32)}"),  # without whose life it is
    (re.compile(r"generation=(\d+)"), lambda found: f"generation={int(found[1]) % (1 << GENERATION_BITS)}"),
    (re.compile(r"<ExitCode\.(\w+): \d+>"), r"\1"),
    (re.compile(r"(job|text|reason|request)='([^']*)'"), r"\1=\2"),
)


def shown(cluster: Cluster, first: int) -> str:
    """The transcript from line `first` on, without times and without what is long."""
    lines = []
    for line in cluster.world.transcript[first:]:
        text = line[11:]
        for pattern, replacement in _SHORTER:
            text = pattern.sub(replacement, text)
        lines.append(text)
    return "\n".join(lines) + "\n"


def small_cluster(*, budget_bytes: int = 1 << 20) -> Cluster:
    """Three nodes, parity 1, a rank on two of them; the third holds parity only."""
    job = JobShape("a", ((0, 100), (1, 65)), every=1, step_s=1.0)
    network = NetworkFaults(delay_s=0.001, delay_s_max=0.001)
    shape = ClusterShape(
        node_count=3,
        parity=1,
        group_size=3,
        jobs=(job,),
        budget_bytes=budget_bytes,
        network=network,
        coding_s_max=0.001,
    )
    cluster = Cluster(1, shape)
    cluster.start()
    return cluster


def until(cluster: Cluster, done: Callable[[], bool]) -> None:
    assert cluster.world.run_until(done, deadline_s=cluster.world.now_s + DEADLINE_S), shown(cluster, 0)[-3000:]


def committed_step(cluster: Cluster) -> int:
    committed = cluster.jobs[0].committed
    return -1 if committed is None else committed.step


def attach_and_plan() -> str:
    cluster = small_cluster()
    until(cluster, lambda: len(cluster.jobs[0].board.get(("planned", 1), {})) == 2)
    return shown(cluster, 0)


def stage_protect_commit_release() -> str:
    cluster = small_cluster()
    until(cluster, lambda: committed_step(cluster) == 0)
    until(cluster, lambda: all(not worker.coder.orders for machine in cluster.machines if (worker := machine.worker)))
    first = len(cluster.world.transcript)
    until(cluster, lambda: committed_step(cluster) == 1)
    return shown(cluster, first)


def worker_restart() -> str:
    cluster = small_cluster()
    until(cluster, lambda: committed_step(cluster) == 1)
    first = len(cluster.world.transcript)
    cluster.crash_worker(1)
    until(cluster, lambda: committed_step(cluster) > 1)
    return shown(cluster, first)


def node_loss_and_restore() -> str:
    cluster = small_cluster()
    until(cluster, lambda: committed_step(cluster) == 1)
    first = len(cluster.world.transcript)
    cluster.lose_node(1, back_after_s=3.0)
    until(cluster, lambda: cluster.jobs[0].life == 2 and cluster.jobs[0].restored_all)
    return shown(cluster, first)


def recover() -> str:
    """An operator asks for a node that lost nothing, for one that is no node, then twice for the one that is back."""
    cluster = small_cluster()
    until(cluster, lambda: committed_step(cluster) == 1)
    cluster.jobs[0].stopped = True
    cluster.jobs[0].kill("its allocation ends")
    cluster.lose_node(1, back_after_s=3.0)
    first = len(cluster.world.transcript)
    until(cluster, lambda: cluster.machines[1].worker is None)
    until(cluster, lambda: cluster.machines[1].worker is not None)
    until(cluster, lambda: cluster.machines[0].worker.node.peers.alive(1))
    answers = [cluster.command(0, messages.AskRecover(name)) for name in ("n2", "nobody", "n1", None)]
    until(cluster, lambda: all(answers) and cluster.machines[1].worker.node.jobs["a"].rebuild.word == "done")
    return shown(cluster, first)


def refused_attach() -> str:
    """A rank of an earlier life, and one that runs elsewhere now, want shards that are not theirs to read."""
    cluster = small_cluster()
    until(cluster, lambda: committed_step(cluster) == 1)
    committed = cluster.jobs[0].committed
    assert committed is not None
    cluster.jobs[0].stopped = True
    cluster.jobs[0].kill("its allocation ends")
    first = len(cluster.world.transcript)
    early = SnapshotId(committed.attempt, committed.step - 1)
    answers = [
        cluster.command(0, messages.OpenShard("a", attempt, snapshot, role))
        for attempt, snapshot, role in ((committed.attempt, early, 0), (committed.attempt, committed, 1))
    ]
    until(cluster, lambda: all(answers))
    return shown(cluster, first)


def refused_plan() -> str:
    cluster = small_cluster(budget_bytes=300)
    until(cluster, lambda: len(cluster.jobs[0].board.get(("planned", 1), {})) == 2)
    return shown(cluster, 0)


@pytest.mark.parametrize(
    "conversation",
    [
        attach_and_plan,
        stage_protect_commit_release,
        worker_restart,
        node_loss_and_restore,
        recover,
        refused_attach,
        refused_plan,
    ],
    ids=lambda conversation: conversation.__name__,
)
def test_a_conversation_is_as_it_was(conversation: Callable[[], str], request: pytest.FixtureRequest) -> None:
    file = HERE / f"{conversation.__name__}.txt"
    said = conversation()
    if request.config.getoption("--rewrite-transcripts"):
        file.write_text(said, encoding="utf-8")
    assert said == file.read_text(encoding="utf-8")
