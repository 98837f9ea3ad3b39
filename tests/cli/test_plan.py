"""`holdfast plan`: golden output, JSON, and that the answers follow from the formulas."""

import json
from pathlib import Path
from typing import Any

import pytest
from holdfast.cli.main import main
from holdfast.protocol import survival
from holdfast.protocol.exit_codes import ExitCode

GOLDEN = """\
16 nodes in 4 failure domains, 2 groups of 8, parity 2
  group 0  0 2 4 6 8 10 12 14
  group 1  1 3 5 7 9 11 13 15

Survives the loss of
  nodes      any 2 in each group at once
  domains    any 1 of the 4
  processes  any number

Each node needs
  memory   256.0 GiB (2 slots x 1.33 x 96.0 GiB)
  traffic  192.0 GiB each way per snapshot, 8.25 s at the link's speed
  rebuild  128.0 GiB received by its replacement, 5.5 s at the link's speed

State would be lost
  in a day   less than 1 in 1,000,000,000
  in a year  1 in 3,050,000
  assuming   a node fails every 6,334 h (any of the 16 every 16.5 days), independently of others,
             and is replaced and rebuilt within 10.1 min

A snapshot is worth taking
  interval   every 133 steps (8.9 min)
  reason     Young's interval: snapshots cost as much as the work that a loss repeats
  time lost  0.04%, to snapshots and repeated work

Warning: Only the loss of any 1 whole domain is survived, with parity 2: 2 of the 8 nodes of group 0
  are in domain 'domain-0'. Set group_size to 4 or less, spread the nodes over more domains, or
  raise parity.
"""


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", "--json", *arguments]) == ExitCode.DONE
    answer = json.loads(capsys.readouterr().out)
    assert isinstance(answer, dict)
    assert answer["schema"] == "holdfast.plan/1"
    return answer


def test_the_answer_to_people(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--nodes 16 --parity 2 --image-gib 96 --link-gb-s 25 --step-s 4 --snapshot-s 0.1 --domains 4"
    assert main(["plan", *arguments.split()]) == ExitCode.DONE
    captured = capsys.readouterr()
    assert captured.out == GOLDEN
    assert captured.err == ""


def test_memory_and_traffic(capsys: pytest.CaptureFixture[str]) -> None:
    answer = plan(capsys, "--nodes", "8", "--parity", "2", "--image-gib", "6", "--slots", "3", "--link-gb-s", "1")
    gib = 1 << 30
    assert answer["memory"] == {
        "image_bytes": 6 * gib,
        "slots": 3,
        "factor": pytest.approx(4 / 3),
        "node_bytes": 24 * gib,
    }
    assert answer["traffic"]["sent_bytes"] == answer["traffic"]["received_bytes"] == 12 * gib
    assert answer["traffic"]["snapshot_s"] == pytest.approx(12 * gib / 1e9)
    assert answer["traffic"]["rebuilt_bytes"] == 8 * gib
    assert answer["odds"]["repair_s"] == pytest.approx(600 + 8 * gib / 1e9)


def test_ragged_groups_are_planned_for_the_smallest(capsys: pytest.CaptureFixture[str]) -> None:
    answer = plan(capsys, "--nodes", "9", "--parity", "2", "--image-gib", "1")
    assert [len(group) for group in answer["groups"]] == [5, 4]
    assert answer["memory"]["factor"] == 2
    assert "Set group_size to 9" in answer["warnings"][0]


def test_odds_are_those_of_the_formula(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--nodes", "64", "--image-gib", "1", "--mtbf-hours", "1000", "--replace-s", "1800"]
    odds = plan(capsys, *arguments)["odds"]
    expected = survival.losses_expected(24, group_sizes=[8] * 8, parity=2, mtbf_h=1000, repair_h=0.5)
    assert odds["loss_per_day"] == pytest.approx(survival.loss_probability(expected))
    assert odds["survival_per_day"] == pytest.approx(1 - odds["loss_per_day"])
    assert odds["loss_per_year"] == pytest.approx(odds["loss_per_day"] * 365.25, rel=1e-2)
    assert odds["job_mtbf_hours"] == pytest.approx(1000 / 64)


@pytest.mark.parametrize(
    ("link_gb_s", "step_s", "snapshot_s", "every", "limit"),
    [
        ("100", "1", "0.5", 255, "cost"),  # sqrt(2 * 0.5 * 64963) rounded
        ("0.01", "1", "0.5", 430, "protection"),  # 4 GiB at 10 MB/s, rounded up
        ("100", "9999", "0.5", 1, "step"),
        ("100", "1", "200000", 200000, "snapshot"),
    ],
)
def test_the_interval_and_what_limits_it(
    link_gb_s: str, step_s: str, snapshot_s: str, every: int, limit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--nodes", "351", "--image-gib", "2", "--link-gb-s", link_gb_s, "--step-s", step_s]
    interval = plan(capsys, *arguments, "--snapshot-s", snapshot_s)["interval"]
    assert (interval["every"], interval["limit"]) == (every, limit)
    assert interval["interval_s"] == every * float(step_s)


def test_without_a_snapshots_cost_there_is_no_interval(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(capsys, "--nodes", "8", "--image-gib", "1")["interval"] is None


def test_domains_by_number_and_by_file_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "domains"
    file.write_text("\n".join(["r0"] * 4 + ["r1"] * 4) + "\n")
    by_file = plan(capsys, "--nodes", "8", "--image-gib", "1", "--group-size", "4", "--domains", str(file))
    by_number = plan(capsys, "--nodes", "8", "--image-gib", "1", "--group-size", "4", "--domains", "2")
    assert by_file["groups"] == by_number["groups"]
    assert by_file["survives"] == {"nodes_per_group": 2, "whole_domains": 1}
    assert by_file["domains"] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes", "2"], "parity 2 needs at least 3 nodes, found 2; set parity to 1 or less"),
        (["--nodes", "8", "--group-size", "2"], "found a group size of 2"),
        (["--nodes", "8", "--domains", "9"], "--domains: expected 1 to 8"),
        (["--nodes", "8", "--domains", "missing"], "No such file"),
        (["--nodes", "8", "--domains", "short"], "expected 8 lines in short, one per node, found 2"),
        (["--nodes", "0"], "from 1 to 4096, found '0'"),
        (["--nodes", "8", "--mtbf-hours", "0"], "above 0"),
    ],
)
def test_what_can_not_be_planned_is_refused_with_numbers(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short").write_text("a\nb\n")
    assert main(["plan", "--image-gib", "1", *arguments]) == ExitCode.USAGE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err


@pytest.mark.parametrize("node_count", [1, 2, 3, 7, 9, 100, 4096])
@pytest.mark.parametrize("parity", [0, 1, 4])
def test_every_size_has_an_answer_or_a_refusal(
    node_count: int, parity: int, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--nodes", str(node_count), "--parity", str(parity), "--image-gib", "0.001", "--snapshot-s", "1"]
    status = main(["plan", *arguments])
    captured = capsys.readouterr()
    assert status == (ExitCode.DONE if node_count > parity else ExitCode.USAGE)
    assert bool(captured.out) == (status == ExitCode.DONE)
    assert "nan" not in captured.out


def test_the_smallest_parity_for_a_wanted_chance(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--nodes", "64", "--image-gib", "80", "--link-gb-s", "25", "--json"]

    def smallest(wanted: str) -> dict[str, float | None]:
        assert main([*words, "--wanted-loss", wanted]) == ExitCode.DONE
        found: dict[str, float | None] = json.loads(capsys.readouterr().out)["smallest_parity"]
        return found

    parities = []
    for wanted in ("0.5", "0.001", "1e-6", "1e-9"):
        found = smallest(wanted)
        parity, chance = found["parity"], found["loss_per_year"]
        assert parity is not None
        assert chance is not None
        assert chance <= float(wanted)
        parities.append(int(parity))
        assert main([*words, "--parity", str(parities[-1] - 1)]) == ExitCode.DONE
        assert json.loads(capsys.readouterr().out)["odds"]["loss_per_year"] > float(wanted)  # one less is not enough
    assert parities == sorted(parities)
    assert parities[0] == 1
    assert (
        main(["plan", "--nodes", "2", "--parity", "1", "--image-gib", "1", "--wanted-loss", "1e-12"]) == ExitCode.DONE
    )
    assert "none is enough" in capsys.readouterr().out


def test_a_trace_is_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("1,0\n1.1,1\n1.2,2\n50,3\n")
    words = ["plan", "--nodes", "8", "--image-gib", "1", "--replace-s", "3600", "--trace", str(trace)]
    assert main([*words, "--parity", "2"]) == ExitCode.DONE
    text = capsys.readouterr().out
    assert "4 of nodes in 2.1 days" in text
    assert "3 of a group at most; parity is 2" in text
    assert "state lost 1 time" in text
    assert main([*words, "--parity", "3", "--json"]) == ExitCode.DONE
    assert json.loads(capsys.readouterr().out)["trace"]["state_losses"] == 0
    trace.write_text("1,9\n")
    assert main(words) == ExitCode.USAGE
    assert "line 1: expected a node from 0 to 7, found 9; give a file" in capsys.readouterr().err
