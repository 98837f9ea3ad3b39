"""Nodes of one machine in network namespaces: each behind a link of its own, all on one bridge. Needs ip, and root.

Covers making and removing them, links of a bounded rate, and links that are cut: both ways, or from one node to
another only. What runs inside is somebody else's. Names carry a tag, so that several sets live side by side.

A rate is kept by tc's token bucket, which most kernels have. A way is cut without any packet filter: the sender is
told a hardware address that nobody has, so that its packets leave and no one takes them, as behind a dead switch.
"""

import os
import subprocess
from collections.abc import Iterable

BURST_BYTES = 64 << 10  # of a link with a rate: what it lets through at once
QUEUE_S = 0.1  # what a full queue before a link with a rate holds; more is dropped
PORT = 7000
_NOBODY = "02:00:00:00:00:fe"  # a locally administered address; those of the nodes are the kernel's
_COMMAND_S = 20.0


class Namespaces:
    """`count` nodes at 10.77.0.1 and so on."""

    def __init__(self, count: int, *, tag: str = "", burst_bytes: int = BURST_BYTES) -> None:
        self.tag, self.count, self.burst_bytes = tag or f"h{os.getpid() % 100000}", count, burst_bytes
        self.addresses = [f"{self._host(node)}:{PORT}" for node in range(count)]

    def make(self) -> None:
        """Make the bridge and the namespaces."""
        run("ip", "link", "add", "name", f"{self.tag}b", "type", "bridge")
        run("ip", "link", "set", f"{self.tag}b", "up")
        for node in range(self.count):
            space, outer = self._space(node), self._outer(node)
            run("ip", "netns", "add", space)
            run("ip", "link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", space)
            run("ip", "link", "set", outer, "master", f"{self.tag}b", "up")
            run("ip", "-n", space, "addr", "add", f"{self._host(node)}/24", "dev", "eth0")
            run("ip", "-n", space, "link", "set", "eth0", "up")
            run("ip", "-n", space, "link", "set", "lo", "up")

    def remove(self) -> None:
        """Remove all of it; what is not there is passed over."""
        for node in range(self.count):
            subprocess.run(["ip", "netns", "del", self._space(node)], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", f"{self.tag}b"], check=False, capture_output=True)

    def inside(self, node: int) -> list[str]:
        """What to put before a command that runs on a node; the command takes the same process."""
        return ["nsenter", f"--net=/run/netns/{self._space(node)}"]

    # --- links ---

    def slow(self, node: int, bytes_per_s: float) -> None:
        """Bound the rate of a node's link, both ways."""
        shape = ["root", "tbf", "rate", f"{int(bytes_per_s * 8)}bit", "burst", str(self.burst_bytes)]
        shape += ["latency", f"{int(QUEUE_S * 1000)}ms"]
        run("tc", "qdisc", "replace", "dev", self._outer(node), *shape)
        run("tc", "-n", self._space(node), "qdisc", "replace", "dev", "eth0", *shape)

    def unslow(self, node: int) -> None:
        """A node's link is as fast as it can be again."""
        run("tc", "qdisc", "del", "dev", self._outer(node), "root")
        run("tc", "-n", self._space(node), "qdisc", "del", "dev", "eth0", "root")

    def unplug(self, node: int) -> None:
        """A node's link is down: nobody reaches it, and it sees so."""
        run("ip", "link", "set", self._outer(node), "down")

    def plug(self, node: int) -> None:
        """A node's link is up again."""
        run("ip", "link", "set", self._outer(node), "up")

    def cut(self, pairs: Iterable[tuple[int, int]]) -> None:
        """For each (sender, receiver): nothing arrives any more, and the sender does not see why."""
        for sender, receiver in pairs:
            self._neighbour("replace", sender, receiver, "lladdr", _NOBODY, "nud", "permanent")

    def join(self, pairs: Iterable[tuple[int, int]]) -> None:
        """For each (sender, receiver): packets arrive again."""
        for sender, receiver in pairs:
            self._neighbour("del", sender, receiver)

    def _neighbour(self, verb: str, sender: int, receiver: int, *how: str) -> None:
        run("ip", "-n", self._space(sender), "neigh", verb, self._host(receiver), *how, "dev", "eth0")

    def _host(self, node: int) -> str:
        return f"10.77.0.{node + 1}"

    def _space(self, node: int) -> str:
        return f"{self.tag}n{node}"

    def _outer(self, node: int) -> str:
        return f"{self.tag}v{node}"


def run(*words: str) -> None:
    """Run a command; its own words where it fails."""
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=_COMMAND_S)
    if done.returncode:
        raise OSError(f"expected '{' '.join(words)}' to work, found status {done.returncode}: {done.stderr.strip()}")


def shapes() -> bool:
    """Whether this kernel can bound a link's rate. Makes a link of its own and removes it."""
    name = f"hs{os.getpid() % 1000000}"
    try:
        run("ip", "link", "add", "name", name, "type", "veth", "peer", "name", f"{name}p")
        run("tc", "qdisc", "add", "dev", name, "root", "tbf", "rate", "8mbit", "burst", "64k", "latency", "100ms")
    except OSError:
        return False
    finally:
        subprocess.run(["ip", "link", "del", name], check=False, capture_output=True)
    return True
