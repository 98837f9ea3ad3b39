"""The manifests are what Kubernetes takes, and promise what the daemon and the command line have."""

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from holdfast.cli.kubernetes import FOUND_AFTER_S_MAX
from holdfast.cli.main import VERBS, main
from holdfast.daemon.shell.door import Door
from holdfast.protocol.config import ClusterConfig, parse_config
from holdfast.protocol.exit_codes import ExitCode, OperatorError
from holdfast.protocol.settings import read_size, split_address
from holdfast.protocol.trust import SECRET_MODE_REFUSED, refuse_exposure
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
FILES = {"DaemonSet": "holdfast.yaml", "StatefulSet": "statefulset.yaml"}
DAEMON_BYTES_MIN = 256 << 20  # beside the arena: the worker, the keeper, chunks on their way


def manifests(name: str) -> dict[str, dict[str, Any]]:
    found = [one for one in yaml.safe_load_all((FOLDER / name).read_text()) if one]
    return {one["kind"]: one for one in found}


def pod(kind: str = "DaemonSet") -> dict[str, Any]:
    spec: dict[str, Any] = manifests(FILES[kind])[kind]["spec"]["template"]["spec"]
    return spec


def trainer() -> dict[str, Any]:
    job = manifests("train.yaml")["JobSet"]["spec"]["replicatedJobs"][0]["template"]
    spec: dict[str, Any] = job["spec"]["template"]["spec"]
    return spec


def config_text() -> str:
    text: str = manifests("holdfast.yaml")["ConfigMap"]["data"]["cluster.toml"]
    return text


def mebibytes(text: str) -> int:
    return read_size(text.removesuffix("i") + "iB")


def test_the_config_in_it_is_one_and_its_doors_are_closed() -> None:
    config = parse_config(config_text(), origin="ConfigMap").config
    refuse_exposure(config)
    mounts = {mount["mountPath"] for mount in pod()["containers"][0]["volumeMounts"]}
    assert config.keys_dir in mounts


def test_the_limit_has_room_for_the_arena_and_the_daemon() -> None:
    config = parse_config(config_text(), origin="ConfigMap").config
    resources = pod()["containers"][0]["resources"]
    assert config.budget_bytes is not None
    assert mebibytes(resources["limits"]["memory"]) >= config.budget_bytes + DAEMON_BYTES_MIN
    assert resources["requests"]["memory"] == resources["limits"]["memory"]  # guaranteed: never evicted for memory


def set_config(monkeypatch: pytest.MonkeyPatch, *, without: tuple[str, ...] = ()) -> ClusterConfig:
    """The config that the first pod of the StatefulSet makes of its command line and environment."""
    container = pod("StatefulSet")["containers"][0]
    words = container["args"]
    for variable in container["env"]:
        monkeypatch.setenv(variable["name"], variable.get("value", "holdfast-0"))
    made: list[ClusterConfig] = []

    def take(config: ClusterConfig, node: str) -> None:
        assert node == "holdfast-0"
        made.append(config)
        raise OperatorError(ExitCode.USAGE, "far enough")

    monkeypatch.setattr("holdfast.cli.kubernetes.wait_for_own_name", take)
    assert main([word for word in words if not word.startswith(without)]) == ExitCode.USAGE
    return made[0]


def test_the_pods_of_the_set_make_their_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    container = pod("StatefulSet")["containers"][0]
    (folder,) = [word.partition("=")[2] for word in container["args"] if word.startswith("--dir=")]
    assert folder in {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    config = set_config(monkeypatch, without=("--dir=",))
    found = manifests("statefulset.yaml")
    assert len(config.nodes) == found["StatefulSet"]["spec"]["replicas"]
    service = found["Service"]
    assert service["metadata"]["name"] == found["StatefulSet"]["spec"]["serviceName"]
    assert {node.host.partition(".")[2] for node in config.nodes} == {service["metadata"]["name"]}
    assert (service["spec"]["clusterIP"], service["spec"]["publishNotReadyAddresses"]) == ("None", True)
    assert service["spec"]["selector"].items() <= found["StatefulSet"]["spec"]["template"]["metadata"]["labels"].items()
    assert found["StatefulSet"]["spec"]["podManagementPolicy"] == "Parallel"
    assert {node.port for node in config.nodes} == {container["ports"][0]["hostPort"]}
    assert config.keys_dir in {mount["mountPath"] for mount in container["volumeMounts"]}
    assert config.budget_bytes is not None
    assert mebibytes(container["resources"]["limits"]["memory"]) >= config.budget_bytes + DAEMON_BYTES_MIN
    probe = container["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] > FOUND_AFTER_S_MAX
    assert config.http_address == f"{probe['httpGet']['host']}:{probe['httpGet']['port']}"


def test_the_command_line_is_ours(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = pod()["containers"][0]["args"]
    assert arguments[0] in VERBS
    missing = [word.replace("$(NODE_NAME)", "gpu-0") for word in arguments]
    assert main(missing) == 2  # every option is known: what it can't find here is the config
    assert "can't read the config /etc/holdfast/cluster.toml" in capsys.readouterr().err
    assert 'ENTRYPOINT ["holdfast"]' in (FOLDER / "Dockerfile").read_text()


def test_both_sides_meet_at_one_socket_as_one_user() -> None:
    arguments = " ".join(pod()["containers"][0]["args"]).replace("=", " ").split()
    socket = Path(arguments[arguments.index("--socket") + 1])
    assert f"--socket={socket}" in pod("StatefulSet")["containers"][0]["args"]
    environment = {one["name"]: one.get("value") for one in trainer()["containers"][0]["env"]}
    assert environment["HOLDFAST_SOCKET"] == str(socket)
    for spec in (pod(), pod("StatefulSet"), trainer()):
        mounts = {mount["name"]: mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        assert mounts["run"] == str(socket.parent)
        assert volumes["run"]["hostPath"]["path"] == str(socket.parent)
        assert spec["securityContext"]["runAsUser"] == 1000
    assert "USER 1000:1000" in (FOLDER / "Dockerfile").read_text()
    assert Door.__doc__


def test_the_daemon_takes_the_mode_of_the_mounted_keys() -> None:
    for kind in FILES:
        keys = next(volume for volume in pod(kind)["volumes"] if volume["name"] == "keys")
        assert keys["secret"]["defaultMode"] & SECRET_MODE_REFUSED == 0


def test_probes_ask_what_the_pages_answer() -> None:
    container = pod()["containers"][0]
    address = parse_config(config_text(), origin="ConfigMap").config.http_address
    host, port = split_address(address)
    pages = (FOLDER.parents[1] / "daemon" / "holdfast" / "daemon" / "shell" / "pages.py").read_text()
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        asked = container[probe]["httpGet"]
        assert (asked["host"], asked["port"]) == (host, port)
        assert f'case "{asked["path"]}":' in pages
    assert pod()["hostNetwork"]  # or 127.0.0.1 would be the kubelet's, not the pod's
    assert manifests("holdfast.yaml")["DaemonSet"]["spec"]["updateStrategy"]["rollingUpdate"]["maxUnavailable"] == 1


def test_nothing_runs_with_more_rights_than_it_needs() -> None:
    for spec in (pod(), pod("StatefulSet"), trainer()):
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]


def test_the_image_has_no_torch_and_the_fast_kernel() -> None:
    project = (FOLDER.parents[1] / "pyproject.toml").read_text()
    needed = re.findall(r'"([a-z0-9-]+)>=', project.partition("\ndependencies = [")[2].partition("]")[0])
    assert "torch" not in needed  # what the image installs is the package without extras
    text = (FOLDER / "Dockerfile").read_text()
    assert "[torch]" not in text
    assert "import holdfast.coding._native" in text


@pytest.mark.parametrize("version", ["1.31", kubernetes_validate.latest_version()])
def test_the_schema_of_kubernetes_takes_them(version: str) -> None:
    for one in [one for file in FILES.values() for one in manifests(file).values()]:
        kubernetes_validate.validate(one, version, strict=True)
    job = manifests("train.yaml")["JobSet"]["spec"]["replicatedJobs"][0]["template"]
    plain = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "ranks"}, **job}
    kubernetes_validate.validate(plain, version, strict=True)
    plain["spec"]["template"]["spec"]["restartPolicies"] = "Never"
    with pytest.raises(kubernetes_validate.ValidationError, match="restartPolicies"):
        kubernetes_validate.validate(plain, version, strict=True)


def test_the_schema_of_jobset_takes_the_training_job() -> None:
    # The models are generated from JobSet's own schema. They drop what they don't know: all must come back.
    job = manifests("train.yaml")["JobSet"]
    assert JobsetV1alpha2JobSet.from_dict(job).to_dict() == job
    job["spec"]["failurePolicy"]["maxRestart"] = 1
    assert JobsetV1alpha2JobSet.from_dict(job).to_dict() != job
