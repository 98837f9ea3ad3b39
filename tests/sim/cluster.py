"""A simulated cluster: machines, network, jobs and the faults that happen to them."""

from collections.abc import Iterable
from dataclasses import dataclass

from holdfast.daemon.core import actions, events
from holdfast.protocol import messages
from holdfast.protocol.config import ClusterConfig, NodeConfig
from holdfast.protocol.placement import place

from sim.machine import Machine, Worker
from sim.network import Network, NetworkFaults
from sim.ranks import Job, JobShape
from sim.readers import Reader
from sim.truth import Truth
from sim.world import World

HEARD_S = 1.6  # three heartbeats
QUIET_S = 8.0  # so long after the last fault, everybody has heard from everybody


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterShape:
    """What a cluster is, for a scenario."""

    node_count: int
    parity: int
    group_size: int
    jobs: tuple[JobShape, ...]
    slots: int = 2
    chunk_bytes: int = 64
    budget_bytes: int = 1 << 20
    coding_s_max: float = 0.005  # of one order to the coding thread
    network: NetworkFaults = NetworkFaults()
    drill_period_s: int = 0
    scrub_period_s: int = 0  # off: resting memory is read in the scenarios that are about it


class Cluster:
    """Everything, from one seed."""

    def __init__(self, seed: int, shape: ClusterShape) -> None:
        self.world = World(seed)
        self.shape = shape
        config = ClusterConfig(
            cluster_name="sim",
            nodes=tuple(
                NodeConfig(name=f"n{node}", host="127.0.0.1", port=7000 + node, domain=f"d{node}")
                for node in range(shape.node_count)
            ),
            parity=shape.parity,
            group_size=shape.group_size,
            slots=shape.slots,
            budget_bytes=4 << 20,
            scrub_period_s=shape.scrub_period_s,
            drill_period_s=shape.drill_period_s,
        )
        # Below what an operator may set: stripes by the dozen in a few kilobytes.
        object.__setattr__(config, "chunk_bytes", shape.chunk_bytes)
        self.placement = place(
            [node.domain for node in config.nodes], group_size=config.group_size, parity=config.parity
        )
        self.network = Network(self.world, shape.network, lambda node: self.machines[node].worker is not None)
        self.machines = [
            Machine(
                self.world,
                self.network,
                config,
                self.placement,
                node=node,
                budget_bytes=shape.budget_bytes,
                coding_s_max=shape.coding_s_max,
            )
            for node in range(shape.node_count)
        ]
        self.truth = Truth(self.machines)
        self.last_fault_s = 0.0
        self.clear_from_s = 0.0  # until then some node may not hear another
        for machine in self.machines:
            machine.machines = self.machines
            machine.after_event = self._observe
        self.jobs = [Job(self.world, self.machines, self.truth, job) for job in shape.jobs]
        self.readers: list[Reader] = []
        for job in self.jobs:
            job.quiet = self.is_quiet
            job.clear = self.is_clear

    def start(self) -> None:
        """Boot all machines, one after the other, and start the jobs."""
        for machine in self.machines:
            self.world.after(self.world.between(0, 0.5), machine.boot)
        for job in self.jobs:
            self.world.after(self.world.between(0.5, 2.0), job.start)

    def _observe(self, worker: Worker, event: events.Event | None, decided: Iterable[actions.Action]) -> None:
        del event
        self.truth.observe(worker, decided)

    def is_quiet(self) -> bool:
        """Whether the last fault was long ago."""
        return self.world.now_s - self.last_fault_s >= QUIET_S

    def is_clear(self) -> bool:
        """Whether every live node has had the time to hear every other."""
        return self.world.now_s >= self.clear_from_s + HEARD_S

    # --- faults ---

    def _fault(self, text: str) -> None:
        self.last_fault_s = max(self.last_fault_s, self.world.now_s)
        self.world.note(f"FAULT {text}")

    def _fault_lasts(self, seconds: float) -> None:
        self.last_fault_s = max(self.last_fault_s, self.world.now_s + seconds)

    def _impaired(self, seconds: float) -> None:
        self._fault_lasts(seconds)
        self.clear_from_s = max(self.clear_from_s, self.world.now_s + seconds)

    def crash_worker(self, node: int, *, after_actions: int | None = None) -> None:
        """Kill a worker, now or in the middle of what it does next; its keeper starts another."""
        machine = self.machines[node]
        if machine.worker is None:
            return
        self._fault(f"crash of the worker of n{node} {'' if after_actions is None else f'in {after_actions} actions'}")
        if after_actions is None:
            machine.crash_worker()
        else:
            machine.worker.crash_after_actions = after_actions
        self._restart_later(machine, self.world.between(0.05, 3.0))

    def _restart_later(self, machine: Machine, seconds: float) -> None:
        self._fault_lasts(seconds)

        def restart() -> None:
            if machine.worker is not None:
                machine.crash_worker()
            self._fault(f"n{machine.node} comes back")
            machine.boot()

        self.world.after(seconds, restart)

    def is_whole(self, node: int) -> bool:
        """Whether a machine is up and holds all that it should hold of every job's newest commit."""
        if self.machines[node].worker is None:
            return False
        for job in self.jobs:
            newest = max(self.truth.known_commits(job.shape.name).values(), default=None)
            if newest is not None:
                key = (job.shape.name, newest)
                geometry = self.truth.geometry(key)
                owes = geometry.data_bytes(node) + geometry.parity_bytes(node) > 0
                if owes and node not in self.truth.stated_now.get(key, set()):
                    return False
        return True

    def may_lose(self, node: int) -> bool:
        """Whether the loss of a node stays within what parity covers."""
        group = self.placement.groups[self.placement.group_of(node)]
        away = [member for member in group if member != node and not self.is_whole(member)]
        return self.machines[node].worker is not None and len(away) < self.shape.parity

    def lose_node(self, node: int, *, back_after_s: float) -> None:
        """A machine is gone with its memory and its ranks; a replacement takes its slot."""
        self._fault(f"loss of n{node}")
        machine = self.machines[node]
        machine.lose()
        self.truth.lost(node)
        for job in self.jobs:
            job.node_lost(node)
        self._restart_later(machine, back_after_s)

    def partition(self, nodes: set[int], *, seconds: float, one_way: bool) -> None:
        """Some nodes don't reach the others, or only in one direction."""
        self._fault(f"partition of {sorted(nodes)} for {seconds:.1f} s{' one way' if one_way else ''}")
        others = set(range(self.shape.node_count)) - nodes
        pairs = {(a, b) for a in nodes for b in others}
        if not one_way:
            pairs |= {(b, a) for a, b in pairs}
        self.network.blocked |= pairs
        self.network.cut(pairs)
        self._impaired(seconds)
        self.world.after(seconds, lambda: self.network.blocked.difference_update(pairs))

    def freeze(self, node: int, seconds: float) -> None:
        """A worker stands still."""
        worker = self.machines[node].worker
        if worker is not None:
            self._fault(f"n{node} freezes for {seconds:.1f} s")
            worker.frozen_until_ns = self.world.now_ns + int(seconds * 1e9)
            self._impaired(seconds)

    def slow(self, node: int, seconds: float) -> None:
        """What a node sends arrives late."""
        self._fault(f"n{node} is slow for {seconds:.1f} s")
        for other in range(self.shape.node_count):
            self.network.slow(node, other, seconds)
        self._impaired(seconds + 3.0)

    def cut(self, node: int) -> None:
        """All connections of a node break and come back at once."""
        self._fault(f"connections of n{node} are cut")
        self._impaired(0.0)
        self.network.cut_node(node)

    def refuse_memory(self, node: int, seconds: float) -> None:
        """The kernel gives no memory for a while."""
        self._fault(f"no memory on n{node} for {seconds:.1f} s")
        machine = self.machines[node]
        machine.refuse_memory = True
        self._fault_lasts(seconds)
        self.world.after(seconds, lambda: setattr(machine, "refuse_memory", False))

    def command(self, node: int, message: messages.ClientMessage) -> list[messages.DaemonMessage]:
        """A command of an operator; its answers appear in the list that is returned."""
        heard: list[messages.DaemonMessage] = []
        worker = self.machines[node].worker
        if worker is not None:
            client = worker.attach(heard.append, lambda: None)
            worker.said(client, message)
            self.world.after(3.0, lambda: worker.detach(client))
        return heard
