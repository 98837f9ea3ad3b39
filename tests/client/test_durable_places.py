"""Which durable copy is begun from, and that a store that can't be had stops no restore that does not need it."""

from pathlib import Path

import pytest
from holdfast.client.agreement import Part
from holdfast.client.copies import METADATA, place
from holdfast.client.durable_places import choose, damage_of
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.messages import RestoreAnswer

NOWHERE = "s3://nowhere/copies"


def make(root: Path, *steps: int) -> None:
    for step in steps:
        path = place(root, "gpt", step=step)
        path.mkdir(parents=True)
        (path / METADATA).touch()


@pytest.mark.parametrize(
    ("snapshot", "problem", "use_older", "chosen"),
    [
        (SnapshotId(1, 30), "", False, None),  # memory has it
        (None, "", False, 30),
        (None, "too much is lost", False, 30),
        (SnapshotId(1, 30), "", True, 20),  # tried too often
        (SnapshotId(1, 10), "", True, None),  # and nothing is older
    ],
)
def test_the_newest_copy_is_begun_from_where_memory_has_nothing_and_an_older_one_after_too_many_lives(
    tmp_path: Path, snapshot: SnapshotId | None, problem: str, *, use_older: bool, chosen: int | None
) -> None:
    make(tmp_path, 10, 20, 30)
    answer = RestoreAnswer("gpt", 4, snapshot, None, problem, durable_dir=str(tmp_path), use_older=use_older)
    found = choose(answer)
    assert (found[0].step if found else None) == chosen
    assert [copy.step for copy in found] == [step for step in (30, 20, 10) if chosen is not None and step <= chosen]
    assert choose(RestoreAnswer("gpt", 4, None, None)) == []


def test_a_store_that_can_not_be_had_stops_only_who_has_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.client.objects.RETRIES_S", 0.0)
    for name, value in (("ENDPOINT", "http://127.0.0.1:1"), ("ACCESS_KEY_ID", "a")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    here = SnapshotId(1, 30)
    assert choose(RestoreAnswer("gpt", 4, here, None, durable_dir=NOWHERE)) == []  # it is not even asked
    older = Part("gpt")
    assert "can't be read: s3://nowhere/copies" in older.offer(
        RestoreAnswer("gpt", 4, here, None, durable_dir=NOWHERE, use_older=True)
    )
    assert not older.fatal
    nothing = Part("gpt")
    assert nothing.offer(RestoreAnswer("gpt", 4, None, None, durable_dir=NOWHERE)) == ""
    assert nothing.fatal
    assert "durable copies can't be read either: s3://nowhere/copies" in nothing.problem
    assert "s3://nowhere/copies" in damage_of(f"{NOWHERE}/gpt/copy-000001-n0")
