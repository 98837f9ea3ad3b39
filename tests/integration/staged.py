"""A job with a shard on every node, staged by this process without torch, and what daemons hold of it."""

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

from holdfast.client.link import Link
from holdfast.protocol import messages
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.layout import Layout, ShardPlace
from local_cluster import DEADLINE_S, LocalCluster, until

JOB = "staged"


def stage(cluster: LocalCluster, *, shard_bytes: int) -> None:
    """Stage and commit one step of random bytes, a shard per node."""
    nodes = range(len(cluster.names))
    layout = Layout(tuple(ShardPlace(node, shard_bytes) for node in nodes), 0, 1)
    wake_fd = os.eventfd(0, os.EFD_NONBLOCK)
    links = [Link(cluster.socket(node), wake_fd=wake_fd) for node in nodes]
    try:
        links[0].send(messages.AskRestore(JOB))
        _until(links[0], lambda: links[0].session.restore_answer is not None)
        answer = links[0].session.restore_answer
        assert answer is not None
        snapshot = SnapshotId(answer.attempt, 0)
        for role, link in enumerate(links):
            until(
                lambda link=link, role=role: _planned(link, messages.Plan(JOB, answer.attempt, role, layout)), "a plan"
            )  # type: ignore[misc]
        for role, link in enumerate(links):
            link.send(messages.Begin(JOB, snapshot, role))
            _until(link, lambda link=link: snapshot in link.session.granted)  # type: ignore[misc]
            granted = link.session.granted[snapshot]
            _until(link, lambda link=link, g=granted: link.memory(JOB, g.slot, g.generation) is not None)  # type: ignore[misc]
            memory = link.memory(JOB, granted.slot, granted.generation)
            assert memory is not None
            memory[:shard_bytes] = random.Random(role).randbytes(shard_bytes)
            link.send(messages.Seal(JOB, snapshot, role))
        for link in links:
            _until(link, lambda link=link: link.session.progress.committed == snapshot)  # type: ignore[misc]
    finally:
        for link in links:
            link.close()
        os.close(wake_fd)


def _planned(link: Link, plan: messages.Plan) -> bool:
    link.session.ask("Plan")
    link.send(plan)
    _until(link, lambda: link.session.accepted is not None or "Plan" in link.session.denied)
    return link.session.accepted is not None


def _until(link: Link, done: Callable[[], bool]) -> None:
    assert link.until(done, deadline_s=time.monotonic() + DEADLINE_S), f"{link.path} did not answer"


def held_pieces(cluster: LocalCluster, node: int) -> set[bytes]:
    """What a node holds, piece by piece: images, and parity with the digests. What is all zeros is left out."""
    found: dict[int, bytes] = {}
    for entry in Path(f"/proc/{cluster.worker(node)}/fd").iterdir():
        if entry.is_symlink() and str(entry.readlink()).startswith(("/memfd:holdfast-data", "/memfd:holdfast-guard")):
            found[entry.stat().st_ino] = entry.read_bytes()  # a mapping keeps a descriptor of its own
    return {piece for piece in found.values() if any(piece)}
