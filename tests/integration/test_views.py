"""A node comes back at another address: the status names those who still dial the old one, and nobody else."""

from collections.abc import Callable
from typing import Any

from local_cluster import LocalCluster, free_ports

MakeCluster = Callable[..., LocalCluster]


def old_views(status: dict[str, Any], node: int) -> list[str]:
    return [old["node"] for old in status["nodes"][node]["old_views"]]


def test_who_dials_the_old_address_of_a_replaced_node_is_named(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(nodes=3, parity=1)
    cluster.start()
    assert [old_views(cluster.status(), node) for node in range(3)] == [[], [], []]
    cluster.kill(2)
    before, after = cluster.ports[2], free_ports(1)[0]
    cluster.config.write_text(cluster.config.read_text().replace(f"127.0.0.1:{before}", f"127.0.0.1:{after}"))
    cluster.spawn(2)
    status = cluster.wait_status(lambda status: old_views(status, 2) == ["n0", "n1"], "nobody has read the new file")
    assert f"dials 127.0.0.1:{before}, it is at 127.0.0.1:{after}" in status["nodes"][2]["old_views"][1]["problem"]
    assert "n1 of n2  dials" in cluster.command("status").stdout

    assert cluster.command("upgrade", node=1).returncode == 0
    cluster.wait_status(lambda status: old_views(status, 2) == ["n0"], "n1 has")
