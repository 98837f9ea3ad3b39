"""A cluster grows, shrinks or both while a job trains: nodes take up the next epoch one after the other, amid faults.

The next epoch is a second `Cluster` in the same world, whose machines carry those of the first as passengers: one
process, one memory, two cores. The job starts again at any moment, then or later; it must find what is committed,
in whichever epoch that is, and at rest be protected in the new one, with nothing left of the old one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from holdfast.protocol.ids import SnapshotId

from sim.cluster import EPOCH, Cluster
from sim.faults import Fault
from sim.ranks import Job
from sim.truth import JobSnapshot, promise

CODES = ((2, 2, 1), (3, 3, 1), (4, 4, 2), (4, 2, 1), (5, 5, 2))  # (nodes, group size, parity), before
MOVED_OWED_S = 60.0  # after the last fault and a restart: the job commits in the new epoch
OVER_OWED_S = 20.0  # after that: nobody serves the epoch before


@dataclass(slots=True)
class Change:
    """Both epochs, and who has taken up which."""

    old: Cluster
    new: Cluster
    waiting: list[int] = field(default_factory=list)  # nodes of the new list that have not taken it up yet

    def take_up(self, node: int) -> None:
        """A node of the new list gets the new config: `holdfast upgrade`, or the first start of one that joins."""
        machine = self.new.machines[node]
        before = machine.passenger
        self.new.world.note(f"{machine.name}: takes up epoch {machine.config.epoch}")
        if before is not None:
            before.crash_worker()
            before.host = machine
        machine.boot()
        self.waiting.remove(node)


def wait_known(cluster: Cluster) -> None:
    """Every job has a commit that all nodes know of: one that only a lost node knows of is nobody's."""

    def known() -> bool:
        count = cluster.shape.node_count
        return all(len(cluster.truth.known_commits(job.shape.name)) == count for job in cluster.jobs)

    cluster.world.run_until(known, deadline_s=cluster.world.now_s + 20.0)


def begin(cluster: Cluster) -> Change:
    """Draw the next list of nodes; nobody has heard of it yet."""
    draw, names = cluster.world.random, [machine.name for machine in cluster.machines]
    kept = draw.sample(names, draw.randint(max(1, len(names) - 2), len(names)))  # in another order
    joined = [f"m{number}" for number in range(draw.choice([0, 1, 1, 2]))]
    together = [*kept, *joined] if draw.random() < 0.7 else draw.sample([*kept, *joined], len(kept) + len(joined))
    group_size = draw.choice([8, cluster.shape.group_size]) if len(together) >= 4 else 8
    return next_epoch(cluster, together, group_size=group_size)


def next_epoch(cluster: Cluster, names: list[str], *, group_size: int = 8) -> Change:
    """The next list of nodes, in this order; nobody has heard of it yet."""
    parity = min(cluster.shape.parity, len(names) - 1)
    shape = replace(
        cluster.shape, node_count=len(names), parity=parity, group_size=max(group_size, parity + 1), jobs=()
    )
    new = Cluster(cluster.world, shape, epoch=EPOCH + 1, names=names)
    change = Change(cluster, new, list(range(len(names))))
    by_name = {machine.name: machine for machine in cluster.machines}
    for machine in new.machines:
        machine.changes = True
        machine.passenger = by_name.get(machine.name)
        if machine.passenger is not None:
            machine.clock_offset_ns = machine.passenger.clock_offset_ns
    for job in cluster.jobs:
        _adapt(change, job)
    return change


def _adapt(change: Change, job: Job) -> None:
    old, new = change.old, change.new
    job.truths[EPOCH + 1] = new.truth
    new.truth.offered, new.truth.beyond = old.truth.offered, old.truth.beyond
    new.truth.forgotten = old.truth.forgotten
    job.quiet = lambda: old.is_quiet() and new.is_quiet()
    job.clear = lambda: old.is_clear() and new.is_clear()

    def is_superseded(name: str, snapshot: SnapshotId) -> bool:
        known = {(name, newer) for newer in new.truth.known_commits(name).values() if newer > snapshot}
        return any(new.truth.is_committed(key) or _was_chosen(new, key) for key in known)

    old.truth.is_superseded = is_superseded
    new.jobs = old.jobs


def _was_chosen(cluster: Cluster, key: JobSnapshot) -> bool:
    """Whether a snapshot is what a job restores though not all facts were heard: whole on those that are left."""
    if key not in cluster.truth.layouts or not cluster.truth.is_finished(key):
        return False
    if key not in cluster.truth.rescued:
        cluster.truth.check_recoverable(*key)
    return True


def place_on_new(change: Change, job: Job) -> None:
    """From its next life on, the job runs on nodes that serve both epochs: others can't read the one before."""
    both = [one for one in change.new.machines if one.passenger is not None and one.passenger.ledger is not None]
    if not both:
        return  # the epoch before is over everywhere
    draw = change.old.world.random
    job.places = [
        machine if machine.name in {one.name for one in both} else draw.choice(both) for machine in job.places
    ]


def play_growth(cluster: Cluster, kinds: tuple[Fault, ...], *, pause_s: float) -> Change:
    """The change, node after node, amid faults; the job may start again at any time in between."""
    world = cluster.world
    change = begin(cluster)
    world.random.shuffle(change.waiting)
    for job in cluster.jobs:
        if world.chance(0.5):
            place_on_new(change, job)
    while change.waiting:
        change.take_up(change.waiting[0])
        _faults(change, kinds, seconds=world.random.choice([0.0, 0.3, 2.0, 5.0]), pause_s=pause_s)
    for job in cluster.jobs:
        place_on_new(change, job)
    _faults(change, kinds, seconds=world.random.choice([0.0, 5.0, 15.0]), pause_s=pause_s)
    return change


def _lose_host(change: Change) -> None:
    """A machine is gone with all that it held of both epochs; its replacement knows the config of today only."""
    old, new, draw = change.old, change.new, change.old.world.random
    machine = draw.choice(old.machines).front
    cluster = new if machine.changes else old
    before = machine.passenger if machine.changes else None
    if not cluster.may_lose(machine.node):
        return
    if any(not one.is_over for one in old.machines if one.host is not None or one is machine):
        mine = before or machine
        if mine.worker is None or not old.may_lose(mine.node):
            return
        both = [one for one in old.machines if one.host is not None and one.worker is not None and one is not mine]
        if before is not None and not both:
            return  # nobody in the new list would know that there was an epoch before
    cluster.lose_node(machine.node, back_after_s=draw.choice([0.5, 4.0, 8.0]))
    if before is not None:
        old.truth.lost(before.node)
        for job in old.jobs:
            place_on_new(change, job)


def _faults(change: Change, kinds: tuple[Fault, ...], *, seconds: float, pause_s: float) -> None:
    world = change.old.world
    end_s = world.now_s + seconds
    while world.now_s < end_s:
        if world.chance(0.3):
            world.random.choice(change.old.jobs).kill("it starts again")
        elif world.chance(0.15):
            _lose_host(change)
        else:
            world.random.choice(kinds)(world.random.choice([change.old, change.new]))
        world.run_until(lambda: False, deadline_s=world.now_s + world.random.expovariate(1 / pause_s))


def rest(change: Change) -> None:
    """Faults stop, the job starts again: it moves, the epoch before ends everywhere, and another start restores."""
    world, old, new = change.old.world, change.old, change.new
    old.network.calm = new.network.calm = True
    world.run_until(lambda: False, deadline_s=max(world.now_s, old.last_fault_s, new.last_fault_s) + 0.001)
    world.note("REST")
    world.run_until(lambda: old.is_quiet() and new.is_quiet(), deadline_s=world.now_s + 30.0)
    for job in old.jobs:
        place_on_new(change, job)
        job.kill("it moves")
        _owed(change, MOVED_OWED_S, f"job {job.shape.name} commits in the new epoch", _moved(change, job))
    stayed = [machine.passenger for machine in new.machines if machine.passenger is not None]
    _owed(change, OVER_OWED_S, "the epoch before ends", lambda: all(m.is_over or m.ledger is None for m in stayed))
    new.truth.check_at_rest()
    for job in old.jobs:
        life, known = job.life, job.committed
        job.kill("a restart at rest")
        _owed(
            change,
            30.0,
            f"job {job.shape.name} restores",
            lambda job=job, life=life: job.life > life and job.restored_all,
        )
        good = job.restored is not None and known is not None and job.restored >= known
        promise(good, f"job {job.shape.name}: {known} was committed, {job.restored} was restored")
    new.truth.check_at_rest()


def _moved(change: Change, job: Job) -> Callable[[], bool]:
    rest_ns = change.old.world.now_ns

    def done() -> bool:
        fresh = job.committed is not None and job.begun_ns.get(job.committed, 0) > rest_ns
        return fresh and job.running and (job.shape.name, job.committed) in change.new.truth.layouts

    return done


def _owed(change: Change, seconds: float, what: str, done: Callable[[], bool]) -> None:
    world = change.old.world
    promise(world.run_until(done, deadline_s=world.now_s + seconds), f"not within {seconds} s: {what}")
