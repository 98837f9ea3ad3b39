"""What keeps one job's resting memory right on one node, and proves it: scrub, comparison, repair, drill.

Covers the one door to them. What they do is said in their own files.
"""

from dataclasses import dataclass, field

from holdfast.daemon.core import events
from holdfast.daemon.core.agreement import Agreement
from holdfast.daemon.core.drill import Drill
from holdfast.daemon.core.job import Job
from holdfast.daemon.core.peers import Peers
from holdfast.daemon.core.repair import Repair
from holdfast.daemon.core.scrub import Scrub
from holdfast.protocol import messages
from holdfast.protocol.health import ChunkSuspected, FingerprintsGiven, WantFingerprints


@dataclass(slots=True)
class Healing:
    """The machines of one job."""

    job: Job
    peers: Peers
    repair: Repair = field(init=False)
    scrub: Scrub = field(init=False)
    agreement: Agreement = field(init=False)
    drill: Drill = field(init=False)

    def __post_init__(self) -> None:
        self.repair = Repair(self.job, self.peers)
        self.scrub = Scrub(self.job, self.repair)
        self.agreement = Agreement(self.job, self.peers, self.repair, self.scrub)
        self.drill = Drill(self.job, self.peers, self.repair)

    def tick(self) -> None:
        """Time passes."""
        self.repair.tick()
        self.scrub.tick()
        self.agreement.tick()
        self.drill.tick()

    def said(self, node: int, message: messages.PeerMessage) -> None:
        """A member of the group said something; what does not concern resting memory is ignored."""
        match message:
            case messages.ChunkUnavailable():
                self.repair.unavailable(node, message)
                self.drill.unavailable(node, message)
            case WantFingerprints():
                self.agreement.wanted(node, message)
            case FingerprintsGiven():
                self.agreement.given(node, message)
            case ChunkSuspected():
                self.agreement.suspected(message)
            case _:
                pass

    def expects(self, header: messages.ChunkHeader) -> bool:
        """Whether a chunk that came is awaited here."""
        return self.repair.expects(header) or self.drill.expects(header)

    def arrived(self, header: messages.ChunkHeader, digest: int) -> None:
        """An awaited chunk came."""
        if self.repair.expects(header):
            self.repair.arrived(header, digest)
        else:
            self.drill.arrived(header, digest)

    def done(self, event: events.ChunksScrubbed | events.ChunkRepaired | events.StripeDrilled) -> None:
        """Work on bytes ended."""
        match event:
            case events.ChunksScrubbed(_, _, ticket, bad, fingerprints):
                if not self.scrub.scrubbed(ticket, bad):
                    self.agreement.read(ticket, bad, fingerprints)
            case events.ChunkRepaired(_, _, wanted, digest, good, changed):
                self.repair.repaired(wanted, digest, good=good, changed=changed)
            case events.StripeDrilled(_, _, stripe, wrong, coded_ns, pattern_count):
                self.drill.drilled(stripe, wrong, coded_ns=coded_ns, pattern_count=pattern_count)
