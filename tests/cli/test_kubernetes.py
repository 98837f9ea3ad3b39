"""Pods by their names, and nodes by what kubectl prints of them; who is refused, and with which words."""

import json
from pathlib import Path
from typing import Any

import pytest
from holdfast.cli.kubernetes import Pod, read_nodes, read_pod, wait_for_own_name
from holdfast.cli.main import main
from holdfast.protocol.config import parse_config
from holdfast.protocol.exit_codes import ExitCode, OperatorError


def test_a_pod_is_known_by_its_name() -> None:
    assert read_pod({}, host="holdfast-0") == Pod("holdfast", 0)
    assert read_pod({"POD_NAME": "my-set-12"}, host="gpu-7") == Pod("my-set", 12)
    for name in ("holdfast", "holdfast-x7f2q", "-1", "Holdfast-1"):
        with pytest.raises(OperatorError, match=r"set POD_NAME from metadata\.name"):
            read_pod({}, host=name)


def test_every_pod_and_the_workstation_make_the_same_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("holdfast.cli.kubernetes.FOUND_AFTER_S_MAX", 0.0)
    options = ["--slots", "3", "--parity", "1", "--address", "127.0.0.1:740{index}"]
    assert main(["config", "kubernetes", "--name", "hold", *options]) == ExitCode.DONE
    wanted = capsys.readouterr().out
    started: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda _, command: started.append(command))
    for pod in ("hold-0", "hold-2"):
        monkeypatch.setenv("POD_NAME", pod)
        main(["daemon", "--from-kubernetes", *options, "--dir", str(tmp_path), "--socket", str(tmp_path / "s")])
        assert (tmp_path / f"{pod}-cluster.toml").read_text() == wanted
        assert started.pop()[4:8] == ["--config", str(tmp_path / f"{pod}-cluster.toml"), "--node", pod]
    config = parse_config(wanted, origin="test").config
    assert [(node.name, node.domain) for node in config.nodes] == [
        (f"hold-{index}", f"hold-{index}") for index in range(3)
    ]


@pytest.mark.parametrize(
    ("pod", "options", "said"),
    [
        ("hold-3", ["--slots", "3"], "expected more than 3, since this is pod hold-3"),
        ("hold-1", [], "expected the StatefulSet's number of replicas, found nothing; give --slots N"),
        ("hold-1", ["--slots", "3", "--without", "a"], "--without: expected none"),
        ("hold-1", ["--slots", "3"], "expected keys"),
    ],
)
def test_what_is_wrong_is_said(
    pod: str, options: list[str], said: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setenv("POD_NAME", pod)
    assert main(["daemon", "--from-kubernetes", *options, "--dir", str(tmp_path)]) != ExitCode.DONE
    assert said in capsys.readouterr().err


def test_a_pod_whose_name_nobody_knows_is_told_what_a_service_needs() -> None:
    text = '[cluster]\nname = "x"\nparity = 0\n[[node]]\nname = "x-0"\naddress = "x-0.invalid:7400"\n'
    with pytest.raises(OperatorError, match=r"x-0\.invalid within 0 s, .*publishNotReadyAddresses: true"):
        wait_for_own_name(parse_config(text, origin="test").config, "x-0", seconds=0)


def node(name: str, address: str | None, **labels: str) -> dict[str, Any]:
    """One row of `kubectl get nodes -o json`, as far as it matters."""
    addresses = [{"type": "Hostname", "address": name}]
    if address is not None:
        addresses.insert(0, {"type": "InternalIP", "address": address})
    return {"kind": "Node", "metadata": {"name": name, "labels": labels}, "status": {"addresses": addresses}}


def test_a_list_of_nodes_becomes_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        node("gpu-b", "fd00::2", rack="r2"),
        node("gpu-a", "10.0.0.1", rack="r1"),
        node("gpu-c", "10.0.0.3", rack="r1"),
    ]
    file = tmp_path / "nodes.json"
    file.write_text(json.dumps({"kind": "List", "items": rows}))
    options = ["config", "kubernetes", "--nodes-json", str(file), "--keys-dir", "/etc/holdfast/keys"]
    assert main([*options, "--domain-label", "rack"]) == ExitCode.DONE
    config = parse_config(capsys.readouterr().out, origin="test").config
    assert [(one.name, one.address, one.domain) for one in config.nodes] == [
        ("gpu-a", "10.0.0.1:7400", "r1"),
        ("gpu-b", "[fd00::2]:7400", "r2"),
        ("gpu-c", "10.0.0.3:7400", "r1"),
    ]
    assert (config.parity, config.cluster_name, config.keys_dir) == (2, "holdfast", "/etc/holdfast/keys")
    assert main([*options, "--slots", "3"]) == ExitCode.USAGE
    assert [one.domain for one in read_nodes(file.read_text(), domain_label=None)] == ["gpu-a", "gpu-b", "gpu-c"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no JSON", "kubectl get nodes -o json"),
        ("[]", "kubectl get nodes -o json"),
        ('{"items": [{"metadata": {}}]}', "kubectl get nodes -o json"),
        ('{"items": []}', "found none; look at the selector"),
        (json.dumps({"items": [node("a", None)]}), "found node a without one"),
        (json.dumps({"items": [node("a", "10.0.0.1", other="x")]}), "the label rack, found node a without one"),
    ],
)
def test_what_is_no_list_of_nodes_is_refused(text: str, said: str) -> None:
    with pytest.raises(OperatorError, match=said):
        read_nodes(text, domain_label="rack")
