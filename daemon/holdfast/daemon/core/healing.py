"""What keeps one job's resting memory right on one node: scrub, comparison with the group, repair.

Covers the one door to them. What they do is said in their own files.
"""

from dataclasses import dataclass, field

from holdfast.daemon.core import events
from holdfast.daemon.core.agreement import Agreement
from holdfast.daemon.core.job import Job
from holdfast.daemon.core.peers import Peers
from holdfast.daemon.core.repair import Repair
from holdfast.daemon.core.scrub import Scrub
from holdfast.protocol import messages
from holdfast.protocol.health import ChunkSuspected, FingerprintsGiven, WantFingerprints


@dataclass(slots=True)
class Healing:
    """The three machines of one job."""

    job: Job
    peers: Peers
    repair: Repair = field(init=False)
    scrub: Scrub = field(init=False)
    agreement: Agreement = field(init=False)

    def __post_init__(self) -> None:
        self.repair = Repair(self.job, self.peers)
        self.scrub = Scrub(self.job, self.repair)
        self.agreement = Agreement(self.job, self.peers, self.repair, self.scrub)

    def tick(self) -> None:
        """Time passes."""
        self.repair.tick()
        self.scrub.tick()
        self.agreement.tick()

    def said(self, node: int, message: messages.PeerMessage) -> None:
        """A member of the group said something; what does not concern resting memory is ignored."""
        match message:
            case messages.ChunkUnavailable():
                self.repair.unavailable(node, message)
            case WantFingerprints():
                self.agreement.wanted(node, message)
            case FingerprintsGiven():
                self.agreement.given(node, message)
            case ChunkSuspected():
                self.agreement.suspected(message)
            case _:
                pass

    def done(self, event: events.ChunksScrubbed | events.ChunkRepaired) -> None:
        """Work on bytes ended."""
        match event:
            case events.ChunksScrubbed(_, _, ticket, bad, fingerprints):
                if not self.scrub.scrubbed(ticket, bad):
                    self.agreement.read(ticket, bad, fingerprints)
            case events.ChunkRepaired(_, _, wanted, digest, good, changed):
                self.repair.repaired(wanted, digest, good=good, changed=changed)
