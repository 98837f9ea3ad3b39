"""One seed, one life of a cluster: a shape, faults for a while, then rest, in which progress is owed."""

from dataclasses import dataclass

from sim import faults, growth
from sim.beyond import play_beyond
from sim.cluster import Cluster, ClusterShape
from sim.long_loss import AFTER_S, play_long_loss
from sim.network import NetworkFaults
from sim.ranks import Job, JobShape
from sim.readers import Reader
from sim.truth import BrokenPromiseError, Truth, promise
from sim.world import World

# (nodes, group size, parity)
SMALL = (
    (1, 1, 0), (2, 2, 1), (3, 3, 0), (3, 3, 1), (4, 4, 1), (4, 4, 2),
    (5, 5, 2), (6, 6, 2), (6, 3, 1), (9, 3, 1), (7, 4, 1), (8, 8, 3),
)  # fmt: skip
FEW = ((2, 2, 1), (3, 3, 1), (3, 3, 0), (4, 4, 2), (4, 2, 1))
WIDE = ((12, 4, 2), (16, 8, 2), (24, 8, 2), (33, 8, 1), (64, 8, 2))

FAULTS_S = 25.0  # how long faults happen
COMMIT_OWED_S = 45.0  # after the last fault: a snapshot that was begun after it is committed
READ_OWED_S = 30.0  # after the last node's loss: a reader has every byte
RESTORE_OWED_S = 25.0  # after a restart at rest: every rank has its bytes


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run did, for those who wonder whether it did anything."""

    events: int
    commits: int
    restores: int
    refusals: int


class ScenarioError(AssertionError):
    """A run that broke a promise or stood still; the text begins with the line that replays it."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Which faults happen, how often, and how bad the network is."""

    kinds: tuple[faults.Fault, ...]
    network: NetworkFaults | None = None  # None: drawn from the seed
    pause_s: float = 3.0  # mean time between two faults
    readers: bool = False  # on every node a client reads what is committed, all the time
    codes: tuple[tuple[int, int, int], ...] = SMALL  # (nodes, group size, parity)
    wide: bool = False  # big clusters, so small jobs
    few: bool = False  # small clusters of jobs that are not hasty: many fit in an hour
    long: bool = False  # at the end, nodes are lost for long, one after the other
    beyond: bool = False  # the faults end with more losses than parity covers
    grows: bool = False  # the cluster takes up another list of nodes amid the faults


PROFILES = {
    "everything": Profile(faults.EVERYTHING),
    "few": Profile(faults.EVERYTHING, codes=FEW, few=True, pause_s=1.5),
    "restarts": Profile(
        (
            faults.worker_crash,
            faults.worker_crash_between_actions,
            *[faults.rank_crash] * 3,
            *[faults.slowness] * 2,
            faults.partition,
            faults.freeze,
            faults.rank_hang,
        ),
        NetworkFaults(lost=0.1, doubled=0.02),
        pause_s=1.5,
    ),
    "losses": Profile(
        (*[faults.node_loss] * 3, faults.memory_loss, faults.rot, faults.rank_crash, faults.cut_connections),
        NetworkFaults(corrupted=0.1),
        pause_s=2.0,
    ),
    "crashes": Profile(
        (faults.worker_crash, *[faults.worker_crash_between_actions] * 3, faults.rank_crash), pause_s=1.0
    ),
    "strays": Profile(
        (*[faults.old_epoch] * 3, *[faults.node_loss] * 3, faults.memory_loss, faults.rank_crash), pause_s=2.0
    ),
    "wide": Profile(faults.EVERYTHING, codes=WIDE, wide=True, pause_s=1.0),
    "beyond": Profile(faults.EVERYTHING, codes=tuple(code for code in SMALL if code[0] > 2), pause_s=5.0, beyond=True),
    "long": Profile(
        (
            *[faults.worker_crash] * 2,
            *[faults.worker_crash_between_actions] * 3,
            faults.rank_crash,
            faults.partition,
            faults.freeze,
            faults.cut_connections,
            faults.scarce_memory,
            faults.clock_jump,
            faults.memory_loss,
        ),
        codes=((4, 4, 1), (4, 4, 2), (5, 5, 2), (6, 6, 2), (6, 3, 1), (9, 3, 1), (7, 4, 1), (8, 8, 3)),
        pause_s=5.0,
        long=True,
    ),
    "growth": Profile(
        (
            *[faults.worker_crash] * 2,
            *[faults.worker_crash_between_actions] * 3,
            *[faults.rank_crash] * 2,
            faults.partition,
            faults.slowness,
            faults.cut_connections,
        ),
        codes=growth.CODES,
        few=True,
        pause_s=1.5,
        grows=True,
    ),
    "reads": Profile(
        (
            faults.worker_crash,
            faults.worker_crash_between_actions,
            *[faults.node_loss] * 3,
            faults.rank_crash,
            faults.partition,
            faults.freeze,
            faults.slowness,
            faults.cut_connections,
        ),
        NetworkFaults(lost=0.01, doubled=0.01, corrupted=0.02),
        readers=True,
    ),
}


def shape_of(world: World, profile: Profile) -> ClusterShape:
    """A cluster drawn from a seed: one group or several, nodes without ranks, ragged shards, one job or two."""
    draw = world.random
    node_count, group_size, parity = draw.choice(profile.codes)
    jobs = []
    for name in ("a", "b")[: 1 if profile.wide else draw.choice([1, 1, 2])]:
        idle = set(draw.sample(range(node_count), draw.choice([0, 0, 1]) if node_count > 1 else 0))
        shards = [
            (node, draw.choice([1, 63, 64, 65, 200, 500, draw.randint(1, 1500)]))
            for node in range(node_count)
            if node not in idle
            for _ in range(
                1 if profile.wide else draw.choice([1, 1, 1, 2] if profile.few else [1, 1, 1, 1, 2, 2, 3, 8])
            )
        ]
        draw.shuffle(shards)
        jobs.append(
            JobShape(
                name,
                tuple(shards),
                every=draw.choice([1, 1, 3]),
                step_s=draw.choice(
                    [1.0, 2.0] if profile.wide else [0.2, 0.4] if profile.few else [0.02, 0.1, 0.1, 0.4, 0.4]
                ),
                stall_s=draw.choice([2.0, 10.0]),
                copy_s_max=draw.choice([0.03, 0.03, 0.03, 2.0]),
                checks=profile.few,
            )
        )
    trouble = draw.choice([0.0, 0.0, 0.003, 0.02])
    return ClusterShape(
        node_count=node_count,
        parity=parity,
        group_size=group_size,
        jobs=tuple(jobs),
        slots=draw.choice([2, 2, 3]),
        coding_s_max=draw.choice([0.005, 0.005, 0.2]),
        reprotect_after_s=AFTER_S if profile.long else 0,
        network=profile.network or NetworkFaults(lost=trouble, doubled=trouble, corrupted=draw.choice([0.0, trouble])),
    )


def _play(cluster: Cluster, profile: Profile) -> Outcome:
    world = cluster.world
    cluster.start()
    if profile.readers:
        for node in range(cluster.shape.node_count):
            cluster.readers.append(Reader(world, cluster.machines, cluster.truth, cluster.jobs[0].shape.name, node))
    world.run_until(lambda: False, deadline_s=world.between(2.0, 8.0))
    if profile.grows:
        growth.wait_known(cluster)
    end_s = world.now_s + (FAULTS_S if not profile.grows else world.random.choice([1.0, 8.0]))
    while world.now_s < end_s:
        world.random.choice(profile.kinds)(cluster)
        world.run_until(lambda: False, deadline_s=world.now_s + world.random.expovariate(1 / profile.pause_s))
    if profile.grows:
        change = growth.play_growth(cluster, profile.kinds, pause_s=profile.pause_s)
        growth.rest(change)
        return _outcome(cluster, [cluster.truth, change.new.truth])
    if profile.beyond:
        play_beyond(cluster)
    if profile.long:
        play_long_loss(cluster, profile.kinds)
    rest(cluster)
    return _outcome(cluster, [cluster.truth])


def _outcome(cluster: Cluster, truths: list[Truth]) -> Outcome:
    return Outcome(
        events=cluster.world.event_count,
        commits=sum(truth.is_committed(key) for truth in truths for key in truth.layouts),
        restores=sum(job.life for job in cluster.jobs),
        refusals=sum(len(job.problems) for job in cluster.jobs),
    )


def rest(cluster: Cluster) -> None:
    """Faults stop: a new snapshot must commit, and a restart must restore."""
    world = cluster.world
    cluster.network.calm = True
    world.run_until(lambda: False, deadline_s=max(world.now_s, cluster.last_fault_s) + 0.001)
    world.note("REST")
    for job in cluster.jobs:
        _owe_commit(cluster, job)
    cluster.truth.check_at_rest()
    world.run_until(cluster.is_quiet, deadline_s=world.now_s + 30.0)
    for job in cluster.jobs:
        _owe_restore(cluster, job)
    cluster.truth.check_at_rest()
    if cluster.readers:
        _owe_read(cluster)


def _owe_commit(cluster: Cluster, job: Job) -> None:
    world, begun, attempts, rest_ns = cluster.world, job.begun, job.life, cluster.world.now_ns
    # Not whatever is above the newest that was begun: all nodes that knew of that attempt may be lost with it.
    done = world.run_until(
        lambda: job.committed is not None and job.begun_ns.get(job.committed, 0) > rest_ns and job.running,
        deadline_s=world.now_s + COMMIT_OWED_S,
    )
    promise(
        done,
        f"job {job.shape.name}: nothing begun after the last fault was committed within {COMMIT_OWED_S} s "
        f"(committed {job.committed}, begun before the rest {begun}, now {job.begun}, lives {attempts}..{job.life}, "
        f"problems {job.problems[-1:]})",
    )


def _owe_restore(cluster: Cluster, job: Job) -> None:
    world, life, known = cluster.world, job.life, job.committed
    job.kill("a restart at rest")
    done = world.run_until(lambda: job.life > life and job.restored_all, deadline_s=world.now_s + RESTORE_OWED_S)
    promise(done, f"job {job.shape.name}: not restored within {RESTORE_OWED_S} s after a restart at rest")
    promise(
        job.restored is not None and known is not None and job.restored >= known,
        f"job {job.shape.name}: {known} was committed, {job.restored} was restored",
    )


def _owe_read(cluster: Cluster) -> None:
    """With the job gone and a node missing, another node's reader gets every byte of what is committed last."""
    world, job = cluster.world, cluster.jobs[0]
    for reader in cluster.readers:
        reader.stopped = True
    job.stopped = True
    job.kill("it ends")
    node = world.random.randrange(cluster.shape.node_count)
    gone = (node + 1) % cluster.shape.node_count
    if cluster.may_lose(gone) and cluster.shape.parity:
        cluster.lose_node(gone, back_after_s=1000.0)
    whole = Reader(world, cluster.machines, cluster.truth, job.shape.name, node, whole=True)
    done = world.run_until(lambda: whole.done, deadline_s=world.now_s + READ_OWED_S)
    told = [denied.text for denied in whole.denials[-2:]]
    promise(done, f"node {node} could not read all of job {job.shape.name} within {READ_OWED_S} s: {told}")


def run(seed: int, profile_name: str = "everything") -> Outcome:
    """One run; a failure names its seed and shows the end of the transcript."""
    profile = PROFILES[profile_name]
    cluster = Cluster(seed, shape_of(World(seed), profile))
    try:
        return _play(cluster, profile)
    except Exception as error:
        kind = "broken promise" if isinstance(error, BrokenPromiseError) else "crash"
        tail = "\n".join(cluster.world.transcript[-40:])
        raise ScenarioError(
            f"seed {seed} ({profile_name}), {cluster.world.now_s:.3f} s, {kind}: {error!r}\n"
            f"replay in tests/: python -m sim {profile_name} {seed}\n{tail}"
        ) from error
