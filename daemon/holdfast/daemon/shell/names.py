"""Where the nodes are whose addresses in the config are names: looked up off the loop, again while a node is away.

Covers names that a resolver knows, such as those of a Kubernetes headless service, where a replacement has the name of
who was there before and another address. libzmq would look names up itself, on the thread that carries all messages:
a resolver that does not answer for one lost node would silence all others.
"""

import ipaddress
import logging
import socket
import threading
import time
from collections.abc import Sequence

log = logging.getLogger(__name__)

_LOOK_S = 2.0  # between two looks for the same node
_LOOKS_COUNT_MAX = 16  # under way at once; one that is not answered takes the resolver's patience, 10 s and more


class Names:
    """The addresses of the cluster's nodes, as far as they are known. `of` from any thread, `look` on the loop's."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self._hosts = tuple(hosts)
        self._known = {node: host for node, host in enumerate(hosts) if _is_address(host)}
        self._fixed = frozenset(self._known)
        self._looked_s: dict[int, float] = {}
        self._under_way: set[int] = set()
        self._lock = threading.Lock()

    def of(self, node: int) -> str | None:
        """The address of a node, None if it was not found yet."""
        return self._known.get(node)

    def look(self, node: int) -> None:
        """Look a node up again, off this thread, unless that is under way or was done a moment ago."""
        now_s = time.monotonic()
        with self._lock:
            busy = node in self._under_way or len(self._under_way) >= _LOOKS_COUNT_MAX
            if node in self._fixed or busy or now_s < self._looked_s.get(node, 0.0) + _LOOK_S:
                return
            self._looked_s[node] = now_s
            self._under_way.add(node)
        threading.Thread(target=self._find, args=(node,), name="names", daemon=True).start()

    def _find(self, node: int) -> None:
        host = self._hosts[node]
        try:
            found = resolved(host)
        except OSError as error:
            log.debug("%s is not found: %s", host, error)
        else:
            before = self._known.get(node)
            if before not in {None, *found}:
                log.info("%s is at %s now; it was at %s", host, found[0], before)
            if before not in found:
                self._known[node] = found[0]
        finally:
            with self._lock:
                self._under_way.discard(node)


def resolved(host: str) -> list[str]:
    """The addresses of a name, in the order in which libzmq would take them.

    Raises:
        OSError: it has none, or nobody answers.
    """
    found = socket.getaddrinfo(host, None, socket.AF_INET6, socket.SOCK_STREAM, 0, socket.AI_V4MAPPED)
    return [str(address[0]).removeprefix("::ffff:") for *_, address in found]


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True
