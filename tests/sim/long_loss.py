"""Nodes are lost for long: the others make up for them, survive as many losses again, and give all back at the end.

Covers one act of a scenario. Its faults go on while nodes are away; what may be lost besides is what the books allow.
"""

from collections.abc import Callable

from sim.cluster import Cluster
from sim.readers import Reader
from sim.truth import promise

SETTLED_S = 40.0  # after the other faults: everybody is back, and every job runs
MADE_UP_S = 90.0  # after the last fault: what the lost nodes left is made up for, on such coders, where that helps
REBUILT_S = 90.0  # three of four nodes, by one that is left, on coders that take a tenth of a second for everything
READ_S = 60.0  # a reader has every byte
AFTER_S = 4  # reprotect_after_s

Fault = Callable[[Cluster], None]


def play_long_loss(cluster: Cluster, kinds: tuple[Fault, ...]) -> None:
    """Lose nodes of one group, one after the other, as long as the books say that they can be lost."""
    world = cluster.world
    _settle(cluster)
    group = cluster.placement.groups[world.random.randrange(len(cluster.placement.groups))]
    lost: list[int] = []
    for _ in range(world.random.choice([1, 2, 3, 3])):
        more = [node for node in group if node not in lost and cluster.may_lose(node)]
        if not more:
            break
        node = world.random.choice(more)
        cluster.lose_node(node, back_after_s=None)
        lost.append(node)
        if cluster.may_lose(next(n for n in group if n not in lost)) and world.chance(0.5):
            continue  # another one at once
        _faults(cluster, kinds)
        if world.chance(0.9):
            _owe_made_up(cluster, group, lost)
        if world.chance(0.2):
            node = world.random.choice(lost)  # a replacement after all, while others stay away
            lost.remove(node)
            cluster.replace_node(node)
            _rest(cluster, 5.0)
    _owe_read(cluster, lost)
    for node in lost:
        cluster.replace_node(node)
    _rest(cluster, 0.001)
    done = world.run_until(lambda: all(map(cluster.is_whole, lost)), deadline_s=world.now_s + REBUILT_S)
    promise(done, f"the replacements of {lost} are not whole within {REBUILT_S} s")


def _rest(cluster: Cluster, seconds: float) -> None:
    world = cluster.world
    world.run_until(lambda: False, deadline_s=max(world.now_s, cluster.last_fault_s) + seconds)


def _settle(cluster: Cluster) -> None:
    _rest(cluster, 0.001)
    cluster.world.run_until(
        lambda: cluster.is_quiet() and all(job.running and job.restored_all and job.committed for job in cluster.jobs),
        deadline_s=cluster.world.now_s + SETTLED_S,
    )


def _faults(cluster: Cluster, kinds: tuple[Fault, ...]) -> None:
    world = cluster.world
    for _ in range(world.random.randint(0, 4)):
        world.random.choice(kinds)(cluster)
        world.run_until(lambda: False, deadline_s=world.now_s + world.random.expovariate(1 / 2.0))


def _owe_made_up(cluster: Cluster, group: tuple[int, ...], lost: list[int]) -> None:
    """At rest, the group survives as many losses as it can: by what it holds, and by what its nodes say."""
    world = cluster.world
    _rest(cluster, 0.001)

    def possible() -> int:
        return min(cluster.shape.parity, len(group) - len(lost) - 1)

    def survived() -> int:
        found = []
        for job in cluster.jobs:
            newest = max(cluster.truth.known_commits(job.shape.name).values(), default=None)
            if newest is not None:
                key = (job.shape.name, newest)
                geometry = cluster.truth.geometry(key)
                if set(group) & geometry.participants:
                    gone = [n for n in group if not cluster.truth.holds(n, job.shape.name, newest)]
                    owing = [n for n in gone if geometry.data_bytes(n) + geometry.parity_bytes(n)]
                    found.append(cluster.truth.estates.more_losses(key, group, owing))
        return min(found, default=possible())

    done = world.run_until(lambda: cluster.is_quiet() and survived() >= possible(), deadline_s=world.now_s + MADE_UP_S)
    text = f"{lost} of {group} are lost for long: {survived()} more losses are survived, {possible()} could be"
    promise(done, f"{text} {MADE_UP_S} s after the last fault")
    _rest(cluster, 2.0)  # until the collector has heard of it
    collector = next(machine.worker for machine in cluster.machines if machine.worker is not None)
    told = {row["name"]: row["more_losses"] for row in collector.node.registry.status()["jobs"]}
    for job in cluster.jobs:
        said = told.get(job.shape.name)
        promise(said is None or said <= survived(), f"{text}; the status says {said} of job {job.shape.name}")


def _owe_read(cluster: Cluster, lost: list[int]) -> None:
    """With all of them away, a reader gets every byte of what is committed last."""
    world = cluster.world
    _rest(cluster, 0.001)
    there = [node for node in range(cluster.shape.node_count) if node not in lost]
    job = cluster.jobs[0]
    if not there or not cluster.truth.known_commits(job.shape.name):
        return
    job_stopped, job.stopped = job.stopped, True
    job.kill("its readers want to be alone")
    node = world.random.choice(there)
    whole = Reader(world, cluster.machines, cluster.truth, job.shape.name, node, whole=True)
    done = world.run_until(lambda: whole.done, deadline_s=world.now_s + READ_S)
    told = [denied.text for denied in whole.denials[-2:]]
    promise(done, f"with {lost} away, node {node} could not read all of job {job.shape.name} within {READ_S} s: {told}")
    job.stopped = job_stopped
    job.start()
