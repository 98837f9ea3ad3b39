"""Sockets for as many nodes as a config may name, and a message that is too large is not sent instead of raised."""

import socket

import pytest
from holdfast.daemon.shell import network
from holdfast.daemon.shell.control import Circle, ControlPlane
from holdfast.daemon.shell.gates import ask_for_descriptors
from holdfast.daemon.shell.network import Poller
from holdfast.protocol import messages
from holdfast.protocol.config import ClusterConfig, NodeConfig

NODE_COUNT = 400  # libzmq's own limit ends below


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def test_hundreds_of_nodes_are_dialled_and_what_does_not_fit_a_frame_is_not_sent(
    caplog: pytest.LogCaptureFixture,
) -> None:
    if ask_for_descriptors() < 5 * NODE_COUNT:
        pytest.skip("too few descriptors allowed here")
    nodes = tuple(
        NodeConfig(name=f"n{node}", host="127.0.0.1", port=free_port() if node == 0 else 1 + node, domain=f"d{node}")
        for node in range(NODE_COUNT)
    )
    config = ClusterConfig(cluster_name="many", nodes=nodes)
    context, poller = network.Context(io_threads=1), Poller()
    control = ControlPlane(Circle(config, 0, None, context), context)
    try:
        for node in range(1, NODE_COUNT):
            control.circle.dial(node, poller)
        control.circle.send_peer(1, messages.StatusGiven(1, {"large": "x" * (2 << 20)}))
        control.send_client(b"nobody", messages.StatusAnswer({"large": "x" * (2 << 20)}))
    finally:
        control.close()
        context.destroy(linger=0)
    assert caplog.text.count("is not sent") == 2
