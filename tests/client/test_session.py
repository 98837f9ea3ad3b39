"""A rank's conversation with its daemon: what each message means, what is forgotten, and that memory stays bounded."""

import pytest
from holdfast.client.session import ProtocolMismatchError, Session
from holdfast.protocol import limits, messages
from holdfast.protocol.cadence import Cadence
from holdfast.protocol.exit_codes import ExitCode
from holdfast.protocol.ids import SnapshotId
from hypothesis import given
from hypothesis import strategies as st

SNAPSHOTS = st.builds(SnapshotId, st.integers(1, 2), st.integers(0, 30))


def session(*, protocol: int = limits.PROTOCOL_VERSION) -> Session:
    welcome = messages.Welcome(
        protocol=protocol, cluster="lab", epoch=1, node=0, node_name="n0", token="t", endpoint="ipc://x"
    )
    return Session(welcome)


def granted(step: int) -> messages.Granted:
    return messages.Granted("gpt", SnapshotId(1, step), 0, 1)


def progress(*, committed: int | None = None, given_up: int | None = None, reason: str = "") -> messages.Progress:
    steps = [None if step is None else SnapshotId(1, step) for step in (committed, given_up)]
    return messages.Progress("gpt", None, None, steps[0], steps[1], reason)


def refused(step: int, text: str) -> messages.Denied:
    return messages.Denied("Begin", "gpt", ExitCode.DONE, text, snapshot=SnapshotId(1, step))


def test_a_daemon_of_another_version_is_refused_with_both_numbers() -> None:
    with pytest.raises(
        ProtocolMismatchError, match=rf"expected protocol version {limits.PROTOCOL_VERSION}.* speaks 99"
    ):
        session(protocol=99)


def test_answers_are_kept_until_the_question_is_asked_again() -> None:
    rank = session()
    rank.receive(messages.PlanAccepted("gpt", 1, 0, 0, 64))
    rank.receive(messages.RestoreAnswer("gpt", 1, None, None))
    rank.receive(messages.ShardPending("gpt", SnapshotId(1, 0), 0, "rebuilding: 1 of 9"))
    rank.receive(messages.ShardOpened("gpt", SnapshotId(1, 0), 0, 0, 1, 0, 64))
    rank.receive(messages.Denied("Plan", "gpt", ExitCode.USAGE, "no"))
    assert rank.accepted is not None
    assert rank.restore_answer is not None
    assert rank.opened is not None
    assert rank.pending_text == "rebuilding: 1 of 9"
    assert rank.denied["Plan"].text == "no"
    for request in ("Plan", "AskRestore", "OpenShard"):
        rank.ask(request)
    assert (rank.accepted, rank.restore_answer, rank.opened, rank.pending_text) == (None, None, None, "")
    assert rank.denied == {}


def test_announced_cadences_are_kept_for_the_newest_attempt_that_was_spoken_of() -> None:
    rank = session()
    for attempt, from_step in ((1, 10), (1, 20), (2, 5)):
        rank.receive(messages.CadenceAnnounced("gpt", attempt, Cadence(1, from_step, 4)))
        assert list(rank.cadences) == [attempt]
    assert rank.cadences[2] == (Cadence(1, 5, 4),)


def test_a_request_that_a_rank_never_makes_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        session().ask("AskStatus")


def test_a_refusal_of_a_snapshot_is_no_refusal_of_the_plan() -> None:
    rank = session()
    rank.receive(refused(3, "given up"))
    assert rank.refused == {SnapshotId(1, 3): "given up"}
    assert rank.denied == {}


def test_a_commit_ends_the_grants_up_to_it() -> None:
    rank = session()
    for step in (1, 2, 3):
        rank.receive(granted(step))
    rank.receive(progress(committed=2))
    assert list(rank.granted) == [SnapshotId(1, 3)]


def test_a_newer_snapshot_that_is_given_up_leaves_an_older_grant_alone() -> None:
    rank = session()
    rank.receive(granted(4))
    rank.receive(progress(given_up=5, reason="another rank was ahead and skipped it"))
    assert list(rank.granted) == [SnapshotId(1, 4)]
    assert list(rank.refused) == [SnapshotId(1, 5)]


def test_a_snapshot_that_is_given_up_is_no_longer_granted() -> None:
    rank = session()
    rank.receive(granted(4))
    rank.receive(progress(given_up=4, reason="a node died"))
    assert rank.granted == {}
    assert rank.refused == {SnapshotId(1, 4): "a node died"}


@given(
    st.lists(
        st.one_of(
            SNAPSHOTS.map(lambda snapshot: messages.Granted("gpt", snapshot, 0, 1)),
            SNAPSHOTS.map(lambda s: messages.Denied("Begin", "gpt", ExitCode.DONE, "no", snapshot=s)),
            st.builds(
                lambda committed, given_up: messages.Progress("gpt", None, None, committed, given_up),
                st.none() | SNAPSHOTS,
                st.none() | SNAPSHOTS,
            ),
        ),
        max_size=60,
    )
)
def test_whatever_is_heard_refusals_stay_few_and_the_last_word_counts(heard: list[messages.DaemonMessage]) -> None:
    rank = session()
    for message in heard:
        rank.receive(message)
        assert len(rank.refused) <= limits.GIVEN_UP_KEPT
        if isinstance(message, messages.Granted):
            assert rank.granted[message.snapshot] == message
        if isinstance(message, messages.Progress):
            assert message.given_up not in rank.granted
            assert all(message.committed is None or snapshot > message.committed for snapshot in rank.granted)
