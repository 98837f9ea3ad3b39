"""What a daemon answers at /metrics is what Prometheus reads; a real one, where there is one, keeps jobs apart."""

import json
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from holdfast.client import Snapshotter
from holdfast.daemon.shell.metrics import METRICS
from local_cluster import LocalCluster, free_ports, until
from prometheus_client.parser import text_string_to_metric_families

PROMETHEUS = Path(__file__).parents[2] / "deploy" / "prometheus"
MakeCluster = Callable[..., LocalCluster]
JOBS = {"gpt": 4.0, "bert": 7.0}  # and the step that each commits


def get(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=20) as answer:
        text: str = answer.read().decode()
    return text


def test_a_daemon_answers_what_prometheus_reads(make_cluster: MakeCluster, tmp_path: Path) -> None:
    ports = free_ports(2)
    cluster = make_cluster(nodes=1, parity=0, settings=("[http]", f'address = "127.0.0.1:{ports[0]}"'))
    cluster.start()
    for job, step in JOBS.items():
        with Snapshotter({"s": torch.zeros(1000)}, job=job, socket=cluster.socket(0), on_error="raise") as snapshotter:
            snapshotter.step(int(step))
    families = {family.name: family for family in text_string_to_metric_families(get(ports[0], "/metrics"))}
    assert set(families) == {name.removesuffix("_total") for name in METRICS}
    for name, (kind, about) in METRICS.items():
        family = families[name.removesuffix("_total")]
        assert (family.type, family.documentation) == (kind, about)
    assert {sample.labels["job"]: sample.value for sample in families["holdfast_committed_step"].samples} == JOBS
    if shutil.which("prometheus") is not None:  # Debian: apt-get install prometheus
        assert committed_in_prometheus(tmp_path, *ports) == JOBS


def committed_in_prometheus(folder: Path, daemon_port: int, port: int) -> dict[str, float]:
    """The committed step of each job, as a Prometheus with our scrape example and our rules has it."""
    scrape = yaml.safe_load((PROMETHEUS / "scrape.yaml").read_text())
    scrape["scrape_configs"][0] |= {
        "scrape_interval": "1s",
        "static_configs": [{"targets": [f"127.0.0.1:{daemon_port}"]}],
    }
    config = folder / "prometheus.yml"
    config.write_text(yaml.safe_dump({**scrape, "rule_files": [str(PROMETHEUS / "alerts.yaml")]}))
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stderr=log) as prometheus,
    ):
        try:
            query = urllib.parse.quote("max by (job) (holdfast_committed_step)")

            def scraped() -> list[dict[str, Any]]:
                try:
                    answer = json.loads(get(port, f"/api/v1/query?query={query}"))
                except OSError:  # not up yet
                    return []
                found: list[dict[str, Any]] = answer["data"]["result"]
                return found

            found = until(scraped, "Prometheus has scraped the daemon")
            return {row["metric"]["job"]: float(row["value"][1]) for row in found}
        finally:
            prometheus.terminate()
