"""Slurm's lists of hosts, which host has which slot, and the config that comes of it."""

import tomllib
from pathlib import Path

import pytest
from holdfast.cli.main import main
from holdfast.cli.slurm import Allocation, assign, config_text, expand, read_allocation
from holdfast.protocol.exit_codes import ExitCode, OperatorError
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("hostlist", "hosts"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1 n2"),
        ("n[1-4,7],login", "n1 n2 n3 n4 n7 login"),
        ("gpu[08-11]", "gpu08 gpu09 gpu10 gpu11"),
        ("r[1-2]n[01-02]", "r1n01 r1n02 r2n01 r2n02"),
        ("c[1,3]-ib.example", "c1-ib.example c3-ib.example"),
        ("n[5]", "n5"),
    ],
)
def test_lists_of_hosts(hostlist: str, hosts: str) -> None:
    assert expand(hostlist) == hosts.split()


@pytest.mark.parametrize(
    "hostlist",
    ["", ",", "n1,", "n[", "n[]", "n]", "n[1-", "n[4-1]", "n[a-b]", "n[1-2", "n[[1]]", "n[1-99999]", "n[1-]x"],
)
def test_what_is_no_list_is_refused(hostlist: str) -> None:
    with pytest.raises(ValueError, match="hosts"):
        expand(hostlist)


def test_a_list_is_bounded() -> None:
    assert len(expand("n[1-4096]")) == 4096
    for hostlist in ("n[1-4096],x", "n[1-1000]m[1-1000]"):
        with pytest.raises(ValueError, match="at most 4096 hosts"):
            expand(hostlist)


@given(st.lists(st.integers(0, 999), min_size=1, max_size=20))
def test_numbers_keep_their_zeros(numbers: list[int]) -> None:
    words = [f"{number:03d}" for number in numbers]
    assert expand(f"n[{','.join(words)}]") == [f"n{word}" for word in words]


def test_spares_take_the_slots_of_the_lost() -> None:
    hosts = ["a", "b", "c", "d", "e"]
    assert assign(hosts, slots=None, without=[]) == hosts
    assert assign(hosts, slots=3, without=[]) == ["a", "b", "c"]
    assert assign(hosts, slots=3, without=["b"]) == ["a", "d", "c"]
    assert assign(hosts, slots=3, without=["b", "d"]) == ["a", "e", "c"]  # the spare is lost as well
    assert assign(hosts, slots=3, without=["d", "b"]) == ["a", "e", "c"]
    with pytest.raises(OperatorError, match="no spare host is left for the slot of a") as caught:
        assign(hosts, slots=3, without=["b", "c", "a"])
    assert caught.value.exit_code is ExitCode.NOT_RECOVERABLE
    for slots, without in ((6, []), (3, ["x"])):
        with pytest.raises(OperatorError):
            assign(hosts, slots=slots, without=without)


@given(st.permutations("abcdefg"), st.integers(1, 7), st.integers(0, 6))
def test_a_host_that_is_not_lost_keeps_its_slot(order: list[str], slots: int, lost_count: int) -> None:
    hosts, lost = list("abcdefg"), order[: min(lost_count, 7 - slots)]
    before = assign(hosts, slots=slots, without=lost[:-1])
    after = assign(hosts, slots=slots, without=lost)
    assert len(set(after)) == slots
    assert not set(after) & set(lost)
    assert sum(one != other for one, other in zip(before, after, strict=True)) <= 1


def test_the_allocation_is_read_from_the_environment() -> None:
    step = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURMD_NODENAME": "n2", "SLURM_RESTART_COUNT": "1"}
    assert read_allocation(step, host="x") == Allocation(job_id="7", hosts=("n1", "n2"), own="n2", restarts=1)
    prolog = {"SLURM_JOB_ID": "7", "SLURM_NODELIST": "n1"}
    assert read_allocation(prolog, host="n1").own == "n1"
    with pytest.raises(OperatorError, match="found no Slurm job; run this under srun"):
        read_allocation({"PATH": "/"}, host="x")


def test_the_config_names_slots_and_says_where_they_are() -> None:
    allocation = Allocation(job_id="7", hosts=("h1", "h2", "h3"), own="h1", restarts=2)
    text = config_text(allocation, ["h1", "h3"], parity=None, address="{host}-ib:74{index:02d}", keys_dir="/k")
    config = tomllib.loads(text)
    assert config["cluster"] == {"name": "slurm-7", "parity": 1, "epoch": 3}
    assert config["security"] == {"keys_dir": "/k"}
    assert [(node["name"], node["address"], node["domain"]) for node in config["node"]] == [
        ("n0", "h1-ib:7400", "h1"),
        ("n1", "h3-ib:7402", "h3"),
    ]
    with pytest.raises(OperatorError, match=r"--address: expected a text with \{host\} or \{index\}"):
        config_text(allocation, ["h1"], parity=0, address="{nothing}:1", keys_dir=None)


def test_the_verb_writes_for_this_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("SLURM_JOB_ID", "7"), ("SLURM_JOB_NODELIST", "h[1-3]"), ("SLURMD_NODENAME", "h2")):
        monkeypatch.setenv(name, value)
    options = ["--slots", "2", "--address", "127.0.0.1:740{index}", "--dir", str(tmp_path / "new")]
    assert main(["config", "slurm", *options]) == ExitCode.DONE
    assert 'address = "127.0.0.1:7401"' in capsys.readouterr().out
    assert main(["config", "slurm", *options, "--write"]) == ExitCode.DONE
    file = Path(capsys.readouterr().out.strip())
    assert file == tmp_path / "new" / "h2-cluster.toml"
    assert file.parent.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("SLURMD_NODENAME", "h3")
    assert main(["daemon", "--from-slurm", *options]) == ExitCode.DONE
    assert "h3 is a spare of job 7" in capsys.readouterr().err
    assert main(["daemon", "--from-slurm", "--slots", "3"]) == ExitCode.WRONG_CLUSTER  # hosts, and no keys
    assert "expected keys" in capsys.readouterr().err
