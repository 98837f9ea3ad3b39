"""The demonstration's trainer: deterministic, knows its place in the data, tells what it does."""

import json
from pathlib import Path

import pytest
import torch
from holdfast.client.restore import restore_into
from holdfast.client.rng import capture_rng, restore_rng
from holdfast.client.shard import ShardLayout
from holdfast.client.state_hash import hash_state
from holdfast.client.tiny_gpt import (
    ByteStream,
    EventFile,
    Options,
    Training,
    parse,
    read_text,
    train,
)

SMALL = {"layers": 1, "width": 16, "context": 8, "batch": 2, "warm_up_steps": 3}


@pytest.fixture
def options(tmp_path: Path) -> Options:
    (tmp_path / "b.py").write_text("print('second')\n" * 20)
    (tmp_path / "a.py").write_text("first = 1\n" * 20)
    return Options(
        steps=5,
        events=tmp_path / "events",
        data=tmp_path,
        snapshots=False,
        hash_steps=frozenset({2}),
        **SMALL,  # type: ignore[arg-type]  # all of them are integers
    )


def events_of(options: Options) -> list[dict[str, object]]:
    return [json.loads(line) for line in options.events.read_text().splitlines()]


def test_two_runs_tell_the_same_story(options: Options) -> None:
    generators = capture_rng()
    try:
        train(options, rank=0, world_size=1)
        train(options, rank=0, world_size=1)
    finally:
        restore_rng(generators)
    told = events_of(options)
    first, second = told[: len(told) // 2], told[len(told) // 2 :]
    assert [event["event"] for event in first] == [
        "start",
        "step",
        "step",
        "step",
        "hash",
        "step",
        "step",
        "hash",
        "end",
    ]
    for name in ("loss", "loss_hex", "sha256", "step", "final"):
        assert [event.get(name) for event in first] == [event.get(name) for event in second]
    losses = [event for event in first if event["event"] == "step"]
    assert all(float.fromhex(str(event["loss_hex"])) == event["loss"] for event in losses)
    assert losses[0]["loss"] != losses[-1]["loss"]
    assert first[-2]["final"] is True
    assert first[0]["restart_count"] == 0


def test_a_restored_training_reaches_the_hashes_of_the_uninterrupted_one(options: Options) -> None:
    generators = capture_rng()
    try:
        training = Training(options, rank=0, world_size=1)
        training.step()
        layout = ShardLayout.build(training.state())
        shard = bytearray(layout.shard_bytes)
        layout.capture().write(memoryview(shard))
        saved_hash = hash_state(training.state())
        expected = [training.step() for _ in range(3)]
        fresh = Training(options, rank=0, world_size=1)
        restore_into(fresh.state(), memoryview(shard))
        assert hash_state(fresh.state()) == saved_hash
        assert [fresh.step() for _ in range(3)] == expected
        assert hash_state(fresh.state()) == hash_state(training.state())
    finally:
        restore_rng(generators)


def test_the_default_model_has_millions_of_parameters(tmp_path: Path) -> None:
    generators = capture_rng()
    try:
        training = Training(Options(steps=1, events=tmp_path), rank=0, world_size=1)
    finally:
        restore_rng(generators)
    assert 3e6 < sum(parameter.numel() for parameter in training.model.parameters()) < 4e6


def test_each_rank_reads_its_own_part_round_and_round(options: Options) -> None:
    text = bytes(range(100))
    streams = [ByteStream(text, options, rank=rank, world_size=2) for rank in range(2)]
    batch, following = streams[1].next_batch()
    assert batch.flatten().tolist() == list(range(50, 66))
    assert following.flatten().tolist() == list(range(51, 67))
    seen = {int(byte) for _ in range(10) for byte in streams[0].next_batch()[0].flatten()}
    assert max(seen) < 50
    assert streams[0].rounds == 3
    again = ByteStream(text, options, rank=0, world_size=2)
    again.load_state_dict(streams[0].state_dict())  # type: ignore[arg-type]  # numbers
    assert torch.equal(again.next_batch()[0], streams[0].next_batch()[0])


def test_too_little_text_is_refused_with_the_numbers(options: Options) -> None:
    with pytest.raises(ValueError, match="30 bytes of text for 2 ranks, expected more than 16 for each"):
        ByteStream(bytes(30), options, rank=0, world_size=2)


def test_text_is_read_in_the_order_of_names(options: Options) -> None:
    text = read_text(options.data)
    assert text.startswith(b"first")
    assert text.endswith(b"print('second')\n")


def test_lines_of_several_ranks_do_not_mix(tmp_path: Path) -> None:
    files = [EventFile(tmp_path / "events", rank) for rank in range(2)]
    for number in range(3):
        for file in files:
            file.append("step", step=number)
    for file in files:
        file.close()
    lines = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    assert [(line["step"], line["rank"]) for line in lines] == [(n, rank) for n in range(3) for rank in range(2)]


def test_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    options = parse(["--steps", "3", "--events", "e", "--hash-steps", "1,2", "--no-snapshots", "--warm-up-steps", "4"])
    assert options == Options(steps=3, events=Path("e"), hash_steps=frozenset({1, 2}), snapshots=False, warm_up_steps=4)
    assert parse(["--steps", "3", "--events", "e", "--ddp", "--job", "j"]).mode == "ddp"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert parse(["--steps", "3", "--events", "e"]).mode == "fsdp"


@pytest.mark.parametrize("wrong", [["--steps", "0"], ["--width", "10", "--heads", "4"], ["--batch", "0"]])
def test_a_wrong_command_line_is_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--steps", "3", "--events", "e", *wrong])
    assert "error" in capsys.readouterr().err


def test_an_unknown_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a mode of"):
        Options(steps=1, events=tmp_path, mode="magic")
