"""Which durable copies there are, which is begun from, and which go."""

import os
from pathlib import Path

import pytest
from holdfast.client import copies as room
from holdfast.client.copies import aside, choose, copies, place, thin
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.messages import RestoreAnswer


def make(root: Path, *steps: int) -> None:
    for step in steps:
        path = place(root, "gpt", step=step)
        path.mkdir(parents=True)
        (path / room.METADATA).touch()


def test_copies_are_in_the_order_in_which_they_were_made_also_where_steps_began_anew(tmp_path: Path) -> None:
    assert copies(tmp_path, "gpt") == []
    make(tmp_path, 10, 20, 5)
    (tmp_path / "gpt" / "copy-9-step-9").mkdir()  # has no table: not whole
    (tmp_path / "gpt" / "notes").mkdir()
    assert [copy.step for copy in copies(tmp_path, "gpt")] == [10, 20, 5]
    assert place(tmp_path, "gpt", step=7).name == "copy-000004-step-7"


def test_only_the_newest_stay_and_what_dead_writers_left_goes(tmp_path: Path) -> None:
    make(tmp_path, 1, 2, 3)
    fresh, stale = tmp_path / "gpt" / ".n1.part", tmp_path / "gpt" / ".n2.part"
    for path in (fresh, stale):
        path.mkdir()
    os.utime(stale, (0, 0))
    thin(tmp_path, "gpt", keep=2)
    assert [copy.step for copy in copies(tmp_path, "gpt")] == [2, 3]
    assert sorted(path.name for path in (tmp_path / "gpt").glob(".*")) == [".n1.part"]
    assert aside(tmp_path, "gpt", node="n1") == fresh
    assert not fresh.exists()


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


def test_every_file_is_compared_with_what_was_written_by_all_ranks_together(tmp_path: Path) -> None:
    for name in ("a.distcp", "b.distcp", "c.distcp", room.METADATA):
        (tmp_path / name).write_bytes(name.encode() * 100)
    (tmp_path / "empty").touch()
    assert room.damage(tmp_path) == "", "a copy of before there were lists"
    room.write_digests(tmp_path)
    assert room.damage(tmp_path) == ""
    flipped = bytearray((tmp_path / "b.distcp").read_bytes())
    flipped[17] ^= 1
    (tmp_path / "b.distcp").write_bytes(flipped)
    assert sum("b.distcp: expected digest" in room.damage(tmp_path, part=part, parts=3) for part in range(3)) == 1
    assert "b.distcp: expected digest" in room.damage(tmp_path)
    (tmp_path / "b.distcp").write_bytes(flipped[:-1])
    assert "b.distcp: expected 800 bytes, found 799" in room.damage(tmp_path)
    (tmp_path / "b.distcp").unlink()
    assert "b.distcp" in room.damage(tmp_path)
