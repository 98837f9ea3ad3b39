"""A simulated cluster: machines, network, jobs and the faults that happen to them."""

from collections.abc import Iterable, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass

from holdfast.daemon.core import actions, events
from holdfast.daemon.core.slot import COMPLETE
from holdfast.protocol import messages
from holdfast.protocol.config import ClusterConfig, NodeConfig
from holdfast.protocol.placement import place

from sim.machine import NODE_BYTES_FREE, Machine, Worker
from sim.network import Network, NetworkFaults
from sim.ranks import Job, JobShape
from sim.readers import Reader
from sim.truth import Truth
from sim.world import World

HEARD_S = 1.6  # three heartbeats
EPOCH = 2  # there was one before
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
    reprotect_after_s: int = 0
    scrub_period_s: int = 0  # off: resting memory is read in the scenarios that are about it


class Cluster:
    """Everything, from one seed."""

    def __init__(
        self, seed: int | World, shape: ClusterShape, *, epoch: int = EPOCH, names: Sequence[str] = ()
    ) -> None:
        """`seed`: or a world in which there is something already; `names`: of the nodes in order, default n0, n1, ..."""
        self.world = World(seed) if isinstance(seed, int) else seed
        names = names or [f"n{node}" for node in range(shape.node_count)]
        self.shape = shape
        config = ClusterConfig(
            cluster_name="sim",
            epoch=epoch,
            nodes=tuple(
                NodeConfig(name=name, host="127.0.0.1", port=7000 + node, domain=name)
                for node, name in enumerate(names)
            ),
            parity=shape.parity,
            group_size=shape.group_size,
            slots=shape.slots,
            budget_bytes=4 << 20,
            scrub_period_s=shape.scrub_period_s,
            drill_period_s=shape.drill_period_s,
            reprotect_after_s=shape.reprotect_after_s,
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
        self.config = config
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
            newest = newest or self.truth.newest_protected(job.shape.name)  # a restore may choose it
            if newest is not None:
                key = (job.shape.name, newest)
                geometry = self.truth.geometry(key)
                owes = geometry.data_bytes(node) + geometry.parity_bytes(node) > 0
                if owes and node not in self.truth.stated_now.get(key, set()):
                    return False
                if node in self.truth.rotten.get(key, set()):
                    return False
        return True

    def may_lose(self, node: int) -> bool:
        """Whether the loss of a node stays within what parity covers."""
        group = self.placement.groups[self.placement.group_of(node)]
        away = [member for member in group if member != node and not self.is_whole(member)]
        if self.machines[node].worker is None:
            return False
        return len(away) < self.shape.parity or self._is_made_up_for(group, {*away, node})

    def _is_made_up_for(self, group: tuple[int, ...], lost: set[int]) -> bool:
        """Whether all members of a group have told that they keep enough of what lost ones left, for every job."""
        if not self.shape.reprotect_after_s:
            return False
        for job in self.jobs:
            newest = max(self.truth.known_commits(job.shape.name).values(), default=None)
            if newest is not None:
                key = (job.shape.name, newest)
                geometry = self.truth.geometry(key)
                owing = {n for n in lost if geometry.data_bytes(n) + geometry.parity_bytes(n)}
                if self.truth.estates.more_losses(key, group, owing, sure=True) < 0:
                    return False
        return True

    def lose_node(self, node: int, *, back_after_s: float | None, ghost: bool = False) -> None:
        """A machine is gone with its memory and its ranks; a replacement takes its slot, or nobody does (None).

        A `ghost` is the machine itself: it was only cut off, and comes back with all that it held.
        """
        self._fault(f"loss of n{node}")
        machine = self.machines[node]
        stray = self._stray(node, self.config) if ghost and machine.ledger is not None else None
        if stray is not None:
            stray.held, stray.ledger = {m: deepcopy(held) for m, held in machine.held.items()}, machine.ledger
        machine.lose()
        self.truth.lost(node)
        for job in self.jobs:
            job.node_lost(machine.name)
        if back_after_s is not None:
            self._restart_later(machine, back_after_s)
        if stray is not None:
            assert back_after_s is not None
            returns_s = back_after_s + self.world.between(0.5, 6.0)
            self._fault_lasts(returns_s)
            self.world.after(returns_s, lambda: self._haunt(stray, self.world.between(1.0, 10.0)))

    def replace_node(self, node: int) -> None:
        """A replacement comes at last."""
        self._restart_later(self.machines[node], self.world.between(0.0, 2.0))

    def lose_memory(self, node: int, *, back_after_s: float) -> None:
        """Keeper and worker of a node die; its ranks live on and meet a daemon that holds nothing."""
        self._fault(f"loss of the memory of n{node}")
        self.machines[node].lose()
        self.truth.lost(node)
        self._restart_later(self.machines[node], back_after_s)

    def start_old_epoch(self, node: int, *, seconds: float) -> None:
        """A daemon starts with an old file of this cluster: it believes to be a node, of an epoch that is over."""
        config = copy(self.config)
        object.__setattr__(config, "epoch", EPOCH - 1)
        self._haunt(self._stray(node, config), seconds)

    def _stray(self, node: int, config: ClusterConfig) -> Machine:
        """A machine that claims a slot which is another's: it can speak, and nobody dials it."""
        stray = Machine(
            self.world,
            self.network,
            config,
            self.placement,
            node=node,
            budget_bytes=self.shape.budget_bytes,
            coding_s_max=self.shape.coding_s_max,
        )
        stray.machines = self.machines
        stray.after_event = lambda worker, _event, _decided: self.truth.overhear(worker)
        return stray

    def _haunt(self, stray: Machine, seconds: float) -> None:
        self._fault(f"a stray n{stray.node} of epoch {stray.config.epoch} speaks up")
        self._fault_lasts(seconds)
        stray.boot()

        def end() -> None:
            if stray.worker is not None:
                stray.worker.dead = True

        self.world.after(seconds, end)

    def rot(self, node: int) -> None:
        """A resting byte of the newest committed snapshot changes while nobody reads."""
        worker = self.machines[node].worker
        if worker is None or not all(job.running and job.restored_all for job in self.jobs):
            return
        for job in self.jobs:
            newest = max(self.truth.known_commits(job.shape.name).values(), default=None)
            parts = worker.node.jobs.get(job.shape.name)
            slot = parts.job.slot_of(newest) if parts is not None and newest is not None else None
            if newest is None or slot is None or slot.phase not in COMPLETE or slot.sizes.total_bytes == 0:
                continue
            held = self.machines[node].held[slot.memory(job.shape.name)]
            assert slot.geometry is not None
            # Padding is nobody's bytes: what rots there is digested and coded with the next snapshot as it is.
            data_bytes = slot.geometry.layout.image_bytes(node)
            pieces = [(held.data, data_bytes), (held.parity, len(held.parity))]
            pieces = [(piece, size) for piece, size in pieces if size]
            if not pieces:  # its image is padding alone
                continue
            piece, size = self.world.random.choice(pieces)
            place = self.world.random.randrange(size)
            self._fault(f"a byte of {newest} of {job.shape.name} rots on n{node}")
            piece[place] ^= 1 << self.world.random.randrange(8)
            self.truth.rotten.setdefault((job.shape.name, newest), set()).add(node)

    def jump_clock(self, node: int, *, seconds: float) -> None:
        """A node's clock jumps ahead."""
        self._fault(f"the clock of n{node} jumps by {seconds} s")
        self._impaired(QUIET_S)  # it believes for a while that nobody was heard for long
        self.machines[node].clock_offset_ns += int(seconds * 1e9)

    def hang_rank(self, job: Job, *, seconds: float) -> None:
        """A rank stands still."""
        if job.running:
            rank = self.world.random.choice(job.ranks)
            self._fault(f"rank {rank.role} of {job.shape.name} hangs for {seconds:.1f} s")
            self._fault_lasts(seconds)
            rank.hangs_until_ns = self.world.now_ns + int(seconds * 1e9)

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

    def refuse_memory(self, node: int, seconds: float, *, known: bool) -> None:
        """The kernel gives no memory for a while; `known`: and says so beforehand."""
        self._fault(f"no memory on n{node} for {seconds:.1f} s")
        machine = self.machines[node]
        machine.refuse_memory, machine.free_bytes = not known, 100 if known else NODE_BYTES_FREE
        self._fault_lasts(seconds)

        def end() -> None:
            machine.refuse_memory, machine.free_bytes = False, NODE_BYTES_FREE

        self.world.after(seconds, end)

    def command(self, node: int, message: messages.ClientMessage) -> list[messages.DaemonMessage]:
        """A command of an operator; its answers appear in the list that is returned."""
        heard: list[messages.DaemonMessage] = []
        worker = self.machines[node].worker
        if worker is not None:
            client = worker.attach(heard.append, lambda: None)
            worker.said(client, message)
            self.world.after(3.0, lambda: worker.detach(client))
        return heard
