"""Which durable copies there are, which is begun from, and which go."""

import os
from pathlib import Path

from holdfast.client import copies as room
from holdfast.client.copies import aside, copies, place, thin


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
