"""How many connections this process takes: beyond a bound on a port no new ones, until there are fewer again.

Covers the TCP ports of the control and bulk planes, which strangers may reach: libzmq accepts whoever comes, so a crowd
would take every descriptor, and then the worker. Those who are connected stay so: a filter on the listening socket
drops what knocks, and nothing else. On the loop's thread.
"""

import contextlib
import ctypes
import logging
import os
import resource
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

log = logging.getLogger(__name__)

STRANGERS_COUNT_MAX = 128  # connections on a port beyond those that the nodes of the cluster may have
_DESCRIPTOR_COUNT_MAX = 65536  # as many as this process asks for; more than 4,096 nodes, their jobs and strangers need
_DESCRIPTORS_PER_NODE_COUNT = 8  # two sockets of ours, their monitors, and its connections to us
_DESCRIPTORS_OF_ITS_OWN_COUNT = 64  # of a worker without peers and jobs, and some of each client
_LOOK_S = 0.1  # between two looks; libzmq accepts a few thousand connections in that time, on a fast machine
_DESCRIPTORS = "/proc/self/fd"
_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27  # of Linux; the socket module does not name them
_RETURN_NOTHING = struct.pack("HBBI", 0x06, 0, 0, 0)  # the one instruction of a filter that drops every packet


def connections_max(node_count: int) -> int:
    """How many connections a port of a cluster's node may have: two of each node while it changes over, and some."""
    return 2 * node_count + STRANGERS_COUNT_MAX


def ask_for_descriptors() -> int:
    """Raise how many descriptors this process may have as far as that is free to do; returns how many that are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTOR_COUNT_MAX if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTOR_COUNT_MAX)
    if wanted > soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


@dataclass(slots=True)
class Gates:
    """The ports of one worker that others reach.

    Attributes:
        ports: port -> what it is called.
        node_count: nodes of the cluster.
    """

    ports: Mapping[int, str]
    node_count: int
    shut: set[int] = field(default_factory=set)
    _look_s: float = 0.0

    def look(self) -> None:
        """Shut the ports that have too many connections, and open those that have fewer again."""
        now_s = time.monotonic()
        if now_s < self._look_s:
            return
        self._look_s = now_s + _LOOK_S
        descriptors = os.listdir(_DESCRIPTORS)  # noqa: PTH208  # often, and the names are all that is wanted
        expected = _DESCRIPTORS_OF_ITS_OWN_COUNT + _DESCRIPTORS_PER_NODE_COUNT * self.node_count
        if len(descriptors) <= expected + STRANGERS_COUNT_MAX // 2 and not self.shut:
            return
        found: dict[int, int] = dict.fromkeys(self.ports, 0)
        listeners: dict[int, int] = {}
        for descriptor in map(int, descriptors):
            with _looked_at(descriptor) as (port, listens):
                if port in found and listens:
                    listeners[port] = descriptor
                elif port in found:
                    found[port] += 1
        for port, descriptor in listeners.items():
            self._decide(port, descriptor, found[port])

    def _decide(self, port: int, listener: int, count: int) -> None:
        most = connections_max(self.node_count)
        if port not in self.shut and count > most:
            self.shut.add(port)
            _drop_what_knocks(listener, yes=True)
            log.error(
                "port %d (%s): expected at most %d connections, found %d; no new ones are taken until there are fewer. "
                "If these are strangers, close the port to all but the nodes",
                port, self.ports[port], most, count,
            )  # fmt: skip
        elif port in self.shut and count <= most - STRANGERS_COUNT_MAX // 2:
            self.shut.discard(port)
            _drop_what_knocks(listener, yes=False)
            log.info("port %d (%s): %d connections; new ones are taken again", port, self.ports[port], count)


@contextlib.contextmanager
def _looked_at(descriptor: int) -> Iterator[tuple[int | None, bool]]:
    """The local TCP port of a descriptor, None if it has none, and whether it listens."""
    try:
        one = socket.socket(fileno=descriptor)
    except OSError:  # no socket, or closed meanwhile
        yield None, False
        return
    try:
        is_tcp = one.family in {socket.AF_INET, socket.AF_INET6} and one.type == socket.SOCK_STREAM
        port = int(one.getsockname()[1]) if is_tcp else None
        listens = is_tcp and bool(one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError:
        port, listens = None, False
    finally:
        one.detach()
    yield port, listens


def _drop_what_knocks(listener: int, *, yes: bool) -> None:
    """Whether packets to a listening socket are dropped; its accepted connections are sockets of their own."""
    one = socket.socket(fileno=listener)
    try:
        if yes:
            code = ctypes.create_string_buffer(_RETURN_NOTHING, len(_RETURN_NOTHING))
            one.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", 1, ctypes.addressof(code)))
        else:
            one.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)
    except OSError as error:
        log.warning("a crowd can't be held off: the kernel refuses a filter on a listening socket: %s", error)
    finally:
        one.detach()
