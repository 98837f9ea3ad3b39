"""What can go wrong in a simulated cluster, one function per kind. A profile draws from a tuple of these.

Covers choosing where and how hard; what a fault does is in `Cluster`.
"""

from collections.abc import Callable

from holdfast.protocol import messages

from sim.cluster import Cluster

Fault = Callable[[Cluster], None]


def _node(cluster: Cluster) -> int:
    return cluster.world.random.randrange(cluster.shape.node_count)


def worker_crash(cluster: Cluster) -> None:
    """SIGKILL to a worker, between two events."""
    cluster.crash_worker(_node(cluster))


def worker_crash_between_actions(cluster: Cluster) -> None:
    """SIGKILL to a worker in the middle of what one event made it do."""
    cluster.crash_worker(_node(cluster), after_actions=cluster.world.random.randrange(60))


def node_loss(cluster: Cluster) -> None:
    """A machine with its ranks and memory; sometimes it comes back later beside its replacement."""
    draw, node = cluster.world.random, _node(cluster)
    if cluster.may_lose(node):
        cluster.lose_node(node, back_after_s=draw.choice([0.5, 4.0, 8.0]), ghost=cluster.world.chance(0.4))


def memory_loss(cluster: Cluster) -> None:
    """Keeper and worker die together: the memory is gone, the ranks live on and meet an empty daemon."""
    draw, node = cluster.world.random, _node(cluster)
    if cluster.may_lose(node):
        cluster.lose_memory(node, back_after_s=draw.choice([0.1, 1.0, 4.0]))


def rank_crash(cluster: Cluster) -> None:
    """A rank dies, and its launcher restarts the job."""
    cluster.world.random.choice(cluster.jobs).kill("a rank crashed")


def rank_hang(cluster: Cluster) -> None:
    """A rank stands still with its connection open, perhaps in the middle of a copy."""
    draw = cluster.world.random
    cluster.hang_rank(draw.choice(cluster.jobs), seconds=draw.uniform(0.5, 12.0))


def fresh_start(cluster: Cluster) -> None:
    """A job restarts and does not want to restore."""
    job = cluster.world.random.choice(cluster.jobs)
    job.next_attempt_fresh = True
    job.kill("a restart that begins afresh")


def partition(cluster: Cluster) -> None:
    """Some nodes don't reach the others, in both directions or one."""
    draw = cluster.world.random
    nodes = set(draw.sample(range(cluster.shape.node_count), draw.randint(1, cluster.shape.node_count)))
    cluster.partition(nodes, seconds=draw.uniform(0.5, 8.0), one_way=cluster.world.chance(0.3))


def freeze(cluster: Cluster) -> None:
    """A worker stands still."""
    cluster.freeze(_node(cluster), cluster.world.between(0.3, 5.0))


def slowness(cluster: Cluster) -> None:
    """What a node sends arrives late."""
    cluster.slow(_node(cluster), cluster.world.between(1.0, 5.0))


def cut_connections(cluster: Cluster) -> None:
    """All connections of a node break and come back at once."""
    cluster.cut(_node(cluster))


def clock_jump(cluster: Cluster) -> None:
    """A node's clock jumps ahead, as after the pause of a virtual machine."""
    cluster.jump_clock(_node(cluster), seconds=cluster.world.random.choice([0.3, 3.0, 20.0, 200.0]))


def new_layout(cluster: Cluster) -> None:
    """The ranks' state changes its size."""
    draw = cluster.world.random
    job = draw.choice(cluster.jobs)
    job.new_sizes = [draw.choice([1, size, size + 100, draw.randint(1, 1200)]) for size in job.sizes]


def rot(cluster: Cluster) -> None:
    """Resting bytes change, of data or of parity."""
    node = _node(cluster)
    if cluster.may_lose(node):
        cluster.rot(node)


def scarce_memory(cluster: Cluster) -> None:
    """The kernel gives no memory, or says that it has none, for a while."""
    cluster.refuse_memory(_node(cluster), cluster.world.between(0.5, 3.0), known=cluster.world.chance(0.5))


def busy_operators(cluster: Cluster) -> None:
    """Commands: status, recover for all, for the wrong node, for a node that does not exist, twice and on two nodes."""
    draw = cluster.world.random
    names = [None, None, f"n{_node(cluster)}", "nobody"]
    question = draw.choice([messages.AskStatus(), messages.AskRecover(), messages.AskRecover(draw.choice(names))])
    for node in (_node(cluster), _node(cluster)):
        for _ in range(draw.choice([1, 2])):
            cluster.command(node, question)


def old_epoch(cluster: Cluster) -> None:
    """A daemon of an earlier epoch of this cluster starts and speaks in the name of a node."""
    cluster.start_old_epoch(_node(cluster), seconds=cluster.world.between(2.0, 20.0))


EVERYTHING: tuple[Fault, ...] = (
    worker_crash,
    worker_crash,
    worker_crash_between_actions,
    worker_crash_between_actions,
    node_loss,
    node_loss,
    node_loss,
    memory_loss,
    rank_crash,
    rank_hang,
    fresh_start,
    partition,
    freeze,
    slowness,
    cut_connections,
    clock_jump,
    new_layout,
    rot,
    scarce_memory,
    busy_operators,
    old_epoch,
)
