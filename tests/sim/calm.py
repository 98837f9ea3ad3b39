"""A cluster without trouble: one group, a rank on each node, and a commit. For tests of one thing at a time."""

from sim.cluster import Cluster, ClusterShape
from sim.network import NetworkFaults
from sim.ranks import JobShape


def calm(*shards_bytes: int, seed: int = 1) -> Cluster:
    """One node for each shard, parity 1; job "a" has committed a snapshot."""
    count = len(shards_bytes)
    shape = ClusterShape(
        node_count=count,
        parity=1,
        group_size=count,
        jobs=(JobShape("a", tuple(enumerate(shards_bytes)), step_s=1.0),),
        network=NetworkFaults(delay_s=0.001, delay_s_max=0.001),
    )
    cluster = Cluster(seed, shape)
    cluster.start()
    assert cluster.world.run_until(lambda: cluster.jobs[0].committed is not None, deadline_s=60.0)
    return cluster
