"""A rank's conversation with its daemon, as state: what was said, what it means, what to answer.

Pure: no socket, clock, thread or memory. `Link` moves the messages, `Stager` waits for what is asked here.

A session lives as long as one connection. Everything in it is forgotten when the daemon goes; the plan is said again
to its successor.
"""

from dataclasses import dataclass, field
from typing import assert_never

from holdfast.protocol import limits, messages
from holdfast.protocol.cadence import Cadence, remembered
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.layout import Layout
from holdfast.protocol.trace import TraceAnswer


class ProtocolMismatchError(Exception):
    """The daemon speaks another version of the protocol."""


@dataclass(frozen=True, slots=True)
class RankPlan:
    """What a rank says to every daemon that it attaches to."""

    job: str
    attempt: int
    role: int
    layout: Layout
    epoch: int = 0  # in which the attempt began; 0: the daemon's own


@dataclass(slots=True)
class Session:
    """What this rank knows from its daemon over one connection."""

    welcome: messages.Welcome
    plan: RankPlan | None = None
    accepted: messages.PlanAccepted | None = None
    restore_answer: messages.RestoreAnswer | None = None
    opened: messages.ShardOpened | None = None
    pending_text: str = ""
    granted: dict[SnapshotId, messages.Granted] = field(default_factory=dict)
    refused: dict[SnapshotId, str] = field(default_factory=dict)
    denied: dict[str, messages.Denied] = field(default_factory=dict)  # by request
    progress: messages.Progress | None = None
    committed_answer: messages.CommittedAnswer | None = None
    ranges_ready: dict[int, messages.RangeReady] = field(default_factory=dict)  # by the number of the request
    ranges_denied: dict[int, messages.RangeDenied] = field(default_factory=dict)
    cadences: dict[int, tuple[Cadence, ...]] = field(default_factory=dict)  # of the newest attempt that was spoken of

    def __post_init__(self) -> None:
        if self.welcome.protocol != limits.PROTOCOL_VERSION:
            raise ProtocolMismatchError(
                f"expected protocol version {limits.PROTOCOL_VERSION}, the daemon speaks {self.welcome.protocol}; "
                "install the same version of holdfast in the trainer and on the node"
            )

    def receive(self, message: messages.DaemonMessage) -> None:
        """Take in one message of the daemon."""
        match message:
            case messages.PlanAccepted():
                self.accepted = message
            case messages.RestoreAnswer():
                self.restore_answer = message
            case messages.ShardOpened():
                self.opened = message
            case messages.ShardPending(text=text):
                self.pending_text = text
            case messages.Granted(snapshot=snapshot):
                self.granted[snapshot] = message
            case messages.CadenceAnnounced(attempt=attempt, cadence=cadence):
                self.cadences = {attempt: remembered(self.cadences.get(attempt, ()), cadence)}
            case messages.Progress():
                self._progressed(message)
            case messages.Denied():
                self._denied(message)
            case messages.CommittedAnswer():
                self.committed_answer = message
            case messages.RangeReady(request=request):
                self.ranges_ready[request] = message
            case messages.RangeDenied(request=request):
                self.ranges_denied[request] = message
            case messages.StatusAnswer() | messages.RecoverAnswer() | messages.ForgetAnswer() | messages.DrillAnswer():
                pass  # answers to commands; a rank never asks
            case TraceAnswer():
                pass  # likewise
            case _:
                assert_never(message)

    def _progressed(self, message: messages.Progress) -> None:
        self.progress = message
        if message.given_up is not None:
            self.refused[message.given_up] = message.reason
            self.granted.pop(message.given_up, None)
        # A grant ends with its own snapshot, not with a newer one that another rank has skipped already.
        if message.committed is not None:
            self.granted = {snapshot: grant for snapshot, grant in self.granted.items() if snapshot > message.committed}
        self._forget_old_refusals()

    def _denied(self, message: messages.Denied) -> None:
        if message.snapshot is not None:
            self.refused[message.snapshot] = message.text
            self._forget_old_refusals()
        else:
            self.denied[message.request] = message

    def forget_range(self, request: int) -> None:
        """A read was closed, or is asked for again under another number."""
        self.ranges_ready.pop(request, None)
        self.ranges_denied.pop(request, None)

    def _forget_old_refusals(self) -> None:
        self.refused = dict(sorted(self.refused.items())[-limits.GIVEN_UP_KEPT :])

    def ask(self, request: str) -> None:
        """Forget an earlier answer to a request that is about to be made (again)."""
        self.denied.pop(request, None)
        match request:
            case "Plan":
                self.accepted = None
            case "AskRestore":
                self.restore_answer = None
            case "OpenShard":
                self.opened, self.pending_text = None, ""
            case "AskCommitted":
                self.committed_answer = None
            case _:
                raise AssertionError(request)
