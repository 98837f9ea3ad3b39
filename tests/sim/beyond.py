"""More losses than parity covers: the answer must be no, with the right names, until an operator lets the job go.

Covers one act of a scenario, after its other faults have come to rest.
"""

import re

from holdfast.protocol import messages

from sim.cluster import Cluster
from sim.ranks import Job
from sim.truth import promise

SETTLED_S = 40.0  # after the other faults: everybody is back, and every job runs
REFUSED_S = 40.0  # after the losses: every job has an answer


def play_beyond(cluster: Cluster) -> None:
    """Lose m + 1 members of a group at once, hear what jobs are told, forget those that can't be restored."""
    world = cluster.world
    world.run_until(lambda: False, deadline_s=max(world.now_s, cluster.last_fault_s) + 0.001)
    world.run_until(
        lambda: cluster.is_quiet() and all(job.running and job.restored_all and job.committed for job in cluster.jobs),
        deadline_s=world.now_s + SETTLED_S,
    )
    group = cluster.placement.groups[world.random.randrange(len(cluster.placement.groups))]
    lost = sorted(world.random.sample(group, world.random.randint(cluster.shape.parity + 1, len(group))))
    before = {job.shape.name: set(cluster.truth.known_commits(job.shape.name).values()) for job in cluster.jobs}
    lives = {job.shape.name: job.life for job in cluster.jobs}
    for job in cluster.jobs:
        job.problems.clear()
    for node in lost:
        cluster.lose_node(node, back_after_s=world.between(0.5, 4.0))
    for job in cluster.jobs:
        job.kill("many nodes are lost")  # a job elsewhere would not notice before it restores
        cluster.truth.beyond |= {(job.shape.name, snapshot) for snapshot in before[job.shape.name]}
        if len(lost) == cluster.shape.node_count:  # nobody is left who could know that anything ever was
            cluster.truth.forget(job.shape.name)
            job.committed = job.begun = None

    def answered(job: Job) -> bool:
        return bool(job.problems) or (job.life > lives[job.shape.name] and job.restored_all)

    done = world.run_until(lambda: all(answered(job) for job in cluster.jobs), deadline_s=world.now_s + REFUSED_S)
    promise(done, f"no answer within {REFUSED_S} s after the loss of nodes {lost}")
    world.run_until(cluster.is_quiet, deadline_s=world.now_s + 30.0)
    for job in cluster.jobs:
        # Who asked while some were away may be told yes now.
        world.run_until(lambda job=job: job.restored_all, deadline_s=world.now_s + 15.0)  # type: ignore[misc]
        if not job.restored_all:
            named = set(re.findall(r"\bn\d+\b", job.problems[-1])) if job.problems else set()
            promise(named, f"job {job.shape.name} is told no without a name: {job.problems[-1:]}")
            for name in named:
                whole = all(cluster.truth.holds(int(name[1:]), job.shape.name, s) for s in before[job.shape.name])
                promise(not whole, f"job {job.shape.name} is told that {name} lost its part: {job.problems[-1:]}")
            _forget(cluster, job)


def _forget(cluster: Cluster, job: Job) -> None:
    """An operator gives up what can't be restored, so that the job begins anew."""
    cluster.truth.forget(job.shape.name)
    job.kill("its operator begins anew")
    job.committed = job.begun = None
    node = cluster.world.random.randrange(cluster.shape.node_count)
    cluster.command(node, messages.AskForget(job.shape.name))
