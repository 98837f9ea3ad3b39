"""A cluster of real daemons grows and shrinks while a rank trains: nothing is lost, and nothing is restarted but it."""

import pytest
from local_cluster import LocalCluster, free_ports, until
from rank_process import RankProcess

JOB = "gpt"


def config_of(cluster: LocalCluster, names: list[str], ports: dict[str, int], *, epoch: int) -> str:
    """The cluster's file with another list of nodes."""
    head = cluster.config.read_text().partition("[[node]]")[0]
    old = next(line for line in head.splitlines() if line.startswith("epoch"))
    head = head.replace(old, f"epoch = {epoch}")
    return head + "".join(f'[[node]]\nname = "{name}"\naddress = "127.0.0.1:{ports[name]}"\n' for name in names)


def upgraded(cluster: LocalCluster, nodes: list[int]) -> None:
    for node in nodes:
        done = cluster.command("upgrade", node=node, seconds=60)
        assert done.returncode == 0, (done.stdout, done.stderr, cluster.log(node)[-3000:])


def step(rank: RankProcess, number: int) -> None:
    until(lambda: _is_protected(rank), "the rank has met its daemon again")
    rank.done("step", step=number)
    rank.done("wait")


def _is_protected(rank: RankProcess) -> bool:
    stats = rank.done("stats")
    return bool(stats["attached"]) and not stats["problem"]


def grown(cluster: LocalCluster, rank: RankProcess, ports: dict[str, int]) -> None:
    """Three nodes take up a list of four, one after the other; the fourth starts; the rank goes on where it is."""
    ports |= {**dict(zip(cluster.names, cluster.ports, strict=True)), "n3": free_ports(1)[0]}
    cluster.names.append("n3")
    cluster.config.write_text(config_of(cluster, ["n0", "n1", "n2", "n3"], ports, epoch=2))
    upgraded(cluster, [0, 1, 2])
    cluster.spawn(3)
    cluster.wait_up()
    step(rank, 2)


@pytest.mark.timeout(300)
def test_a_rank_trains_on_while_nodes_join_and_moves_when_it_starts_again() -> None:
    with LocalCluster(nodes=3, parity=1) as cluster:
        cluster.start()
        with RankProcess(socket=cluster.socket(0), job=JOB) as rank:
            assert rank.done("restore") is None
            step(rank, 1)
            grown(cluster, rank, {})
            row = cluster.status(0)["earlier"]
            assert (row["epoch"], row["waits_for"], row["leaving"]) == (1, [JOB], [])
            assert "epoch 1 is kept until a commit in epoch 2 of gpt (step 2)" in cluster.command("status").stdout
            cluster.kill_worker(0)  # amid the change: another worker takes both epochs up
            step(rank, 3)
        with RankProcess(socket=cluster.socket(0), job=JOB) as rank:
            assert rank.done("restore") == 3, "from the epoch before"
            assert rank.done("equal", step=3)
            step(rank, 4)
            for node in range(4):
                cluster.wait_status(lambda s: s["earlier"] is None, "epoch 1 is over", node=node)
            assert sorted(name for group in cluster.status(0)["groups"] for name in group) == cluster.names
        cluster.kill_worker(0)
        with RankProcess(socket=cluster.socket(0), job=JOB) as rank:
            assert rank.done("restore") == 4, "from the epoch in force"
            assert rank.done("equal", step=4)


@pytest.mark.timeout(300)
def test_a_node_that_leaves_is_needed_until_the_job_has_moved() -> None:
    with LocalCluster(nodes=4, parity=1) as cluster:
        cluster.start()
        ports = dict(zip(cluster.names, cluster.ports, strict=True))
        with RankProcess(socket=cluster.socket(0), job=JOB) as rank:
            assert rank.done("restore") is None
            step(rank, 1)
            smaller = config_of(cluster, ["n0", "n2", "n3"], ports, epoch=2)
            cluster.config.write_text(smaller)
            refused = cluster.command("upgrade", node=1)
            assert refused.returncode == 2
            assert "the running one stays" in refused.stderr
            upgraded(cluster, [0, 2, 3])
            row = cluster.status(0)["earlier"]
            assert (row["epoch"], row["leaving"]) == (1, ["n1"])
            cluster.config.write_text(smaller.replace("epoch = 2", "epoch = 3"))
            refused = cluster.command("upgrade", node=0)
            assert refused.returncode == 5
            assert "to be over before another one begins" in refused.stderr
            cluster.config.write_text(smaller)
            step(rank, 2)
        with RankProcess(socket=cluster.socket(0), job=JOB) as rank:
            assert rank.done("restore") == 2
            step(rank, 3)
            for node in (0, 2, 3):
                cluster.wait_status(lambda s: s["earlier"] is None, "epoch 1 is over", node=node)
        cluster.kill(1)
        with RankProcess(socket=cluster.socket(0), job=JOB) as rank:
            assert rank.done("restore") == 3
            assert rank.done("equal", step=3)
