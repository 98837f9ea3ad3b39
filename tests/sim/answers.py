"""What a simulated job is told to restore, held against the books of every epoch."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from holdfast.protocol import messages
from holdfast.protocol.ids import SnapshotId

from sim.machine import Machine
from sim.truth import Truth, promise

if TYPE_CHECKING:
    from sim.ranks import Job

Known = list[tuple[Machine, SnapshotId]]


def known_commits(job: "Job") -> Known:
    """What each live node knows to be committed, in every epoch."""
    return [
        (truth.machines[node], known)
        for truth in job.truths.values()
        for node, known in truth.known_commits(job.shape.name).items()
    ]


def check_answer(job: "Job", answer: messages.RestoreAnswer, known_before: Known) -> None:
    """Nothing is refused that could be had, and what is offered is the newest that was known, and can be had."""
    name = job.shape.name
    job.answered = True
    if answer.problem:
        job.problems.append(answer.problem)
        promise(
            not job.quiet() or not any(_is_recoverable(name, truth) for truth in job.truths.values()),
            f"refused, yet recoverable: {answer.problem}",
        )
    elif answer.snapshot is not None:
        held = job.truths[answer.held_epoch or answer.epoch]
        held.check_offer(name, answer.snapshot)
        held.check_recoverable(name, answer.snapshot)
    if answer.problem or job.ask_fresh:
        return
    chosen = answer.snapshot if answer.held_epoch in {0, answer.epoch} else None
    job.truths[answer.epoch].chosen[name, answer.attempt] = chosen
    if answer.held_epoch not in {0, answer.epoch}:
        job.truths[answer.held_epoch].chosen[name, answer.held_attempt] = answer.snapshot
    if job.clear():
        job.truth.check_forward(name, answer.snapshot)
        newest = max(_long_known(job, known_before), default=None)
        known = f"{newest} is known to be committed, offered is {answer.snapshot}"
        promise(newest is None or (answer.snapshot is not None and answer.snapshot >= newest), known)


def _long_known(job: "Job", known_before: Known) -> Iterable[SnapshotId]:
    """Commits that nodes knew of when the question was asked, which have been up and heard for long enough."""
    limit_ns = job.world.now_ns - 2 * 10**9
    return [known for one, known in known_before if one.worker and one.booted_ns < limit_ns]


def _is_recoverable(name: str, truth: Truth) -> bool:
    """Whether the live nodes hold enough of any snapshot that one of them knows to be committed."""
    for snapshot in set(truth.known_commits(name).values()):
        geometry = truth.geometry((name, snapshot))
        lost = {
            node
            for node in range(len(truth.machines))
            if geometry.data_bytes(node) + geometry.parity_bytes(node)
            and (truth.machines[node].worker is None or not truth.holds(node, name, snapshot))
        }
        books, key = truth.estates, (name, snapshot)
        if all(books.more_losses(key, group, lost & set(group)) >= 0 for group in geometry.placement.groups):
            return True
    return False
