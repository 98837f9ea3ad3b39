"""Two epochs in one simulated worker process: the real `Epochs` between two cores, and whose hands carry out what."""

import itertools
from typing import TYPE_CHECKING

from holdfast.daemon.core import actions, events
from holdfast.daemon.core.epochs import Epochs
from holdfast.daemon.core.node import Node

if TYPE_CHECKING:
    from sim.machine import Worker


class Household:
    """Two cores in one worker process, and whose hands do what they decide."""

    def __init__(self, worker: "Worker", passenger: "Worker | None") -> None:
        self.worker, self.passenger = worker, passenger
        self.epochs = Epochs(worker.node, passenger.node if passenger is not None else None)
        if passenger is not None:
            passenger.household, passenger.clients = self, worker.clients

    def handle(self, event: events.Event, core: Node | None) -> None:
        """The loop's turn, for both."""
        self.perform(self.epochs.handle(event, self.worker.machine.clock_ns, core), event)

    def perform(self, decided: list[tuple[Node, actions.Action]], event: events.Event | None) -> None:
        """Carry out in order; either half may be where the process dies."""
        runs = [(core, [action for _, action in run]) for core, run in itertools.groupby(decided, lambda pair: pair[0])]
        both = [one for one in (self.passenger, self.worker) if one is not None]
        idle = [one.node for one in both if all(core is not one.node for core, _ in runs)]
        for core, run in [*runs, *((core, list[actions.Action]()) for core in idle)]:
            hands = next((one for one in both if one.node is core), None)
            if self.worker.dead:
                return
            if hands is not None:
                hands.perform(run, event)
        if self.epochs.is_over and not self.worker.dead:
            assert self.passenger is not None
            passenger, self.passenger = self.passenger, None
            for _, action in self.epochs.end_earlier():
                assert isinstance(action, actions.Free)
                passenger.machine.held.pop(action.memory, None)
            passenger.machine.leave()
