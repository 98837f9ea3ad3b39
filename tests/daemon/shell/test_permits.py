"""A trainer over the network touches its own shard from grant to seal, and reads what was opened until it closes it."""

from holdfast.daemon.shell.permits import OPEN_COUNT_MAX, Permits
from holdfast.protocol import messages
from holdfast.protocol.frames import pack_digests
from holdfast.protocol.ids import SnapshotId

S = SnapshotId(2, 7)
PLACE = ("job", 0, 3)


def staging() -> Permits:
    permits = Permits()
    permits.told(messages.PlanAccepted("job", 2, 1, 1000, 500))
    permits.told(messages.Granted("job", S, 0, 3))
    return permits


def test_its_own_shard_is_written_between_grant_and_seal_and_nothing_else_ever() -> None:
    permits = Permits()
    permits.told(messages.PlanAccepted("job", 2, 1, 1000, 500))
    assert not permits.may_write(PLACE, 1000, 1500), "not granted yet"
    permits = staging()
    assert permits.may_write(PLACE, 1000, 1500)
    assert permits.may_write(PLACE, 1499, 1500)
    assert not permits.may_write(PLACE, 999, 1001), "another rank's"
    assert not permits.may_write(PLACE, 1400, 1501)
    assert not permits.may_write(PLACE, 1200, 1200)
    assert not permits.may_write(("job", 1, 3), 1000, 1500), "the slot of what is committed"
    assert not permits.may_write(("job", 0, 2), 1000, 1500), "memory that was replaced"
    assert not permits.may_write(("other", 0, 3), 1000, 1500)
    assert not permits.may_read(PLACE, 1000, 1500)
    permits.said(messages.Seal("job", S, 1))
    assert not permits.may_write(PLACE, 1000, 1500)


def test_what_is_skipped_is_not_written_any_more() -> None:
    permits = staging()
    permits.said(messages.Skip("job", S, 1, "torn"))
    assert not permits.may_write(PLACE, 1000, 1500)


def test_a_grant_of_an_attempt_without_a_plan_permits_nothing() -> None:
    permits = Permits()
    permits.told(messages.PlanAccepted("job", 2, 1, 1000, 500))
    permits.told(messages.Granted("job", SnapshotId(3, 0), 0, 3))
    assert not permits.may_write(PLACE, 1000, 1500)


def test_an_opened_shard_is_read_until_it_is_closed_with_the_chunks_under_it_if_those_are_compared() -> None:
    permits = Permits()
    permits.told(messages.ShardOpened("job", S, 1, 0, 3, 1000, 500))
    assert permits.may_read(PLACE, 1000, 1500)
    assert not permits.may_read(PLACE, 900, 1500)
    whole = messages.ShardOpened("job", S, 1, 0, 3, 1000, 500, 256, 3, pack_digests((1, 2, 3)))
    permits.told(whole)
    assert whole.bytes_read == (768, 1536)
    assert permits.may_read(PLACE, 768, 1536)
    assert not permits.may_write(PLACE, 1000, 1500)
    permits.said(messages.CloseShard("job", S, 1))
    assert not permits.may_read(PLACE, 1000, 1500)


def test_a_lent_range_is_read_until_it_is_closed() -> None:
    permits = Permits()
    permits.told(messages.RangeReady(5, "job", 9, 1, 10, 20))
    assert permits.may_read(("job", 9, 1), 10, 30)
    permits.said(messages.CloseRange(5))
    assert not permits.may_read(("job", 9, 1), 10, 30)


def test_what_is_remembered_is_bounded() -> None:
    permits = staging()
    for step in range(100):
        permits.told(messages.Granted("job", SnapshotId(2, step), 0, step))
        permits.told(messages.RangeReady(step, "job", 9, step, 0, 1))
    assert len(permits.writing) == len(permits.reading) == OPEN_COUNT_MAX
    assert permits.may_write(("job", 0, 99), 1000, 1500)
    for attempt in range(100):
        permits.told(messages.PlanAccepted("job", attempt, 1, 0, 1))
    permits.told(messages.Granted("job", S, 1, 7))
    assert not permits.may_write(("job", 1, 7), 0, 1), "of a plan that was forgotten"
