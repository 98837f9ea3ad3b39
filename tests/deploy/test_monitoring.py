"""Dashboard and alert rules are what Prometheus reads, and ask only for metrics and labels that a daemon has."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from holdfast.daemon.core.ledger import JobRecord, LedgerRecord
from holdfast.daemon.shell.metrics import METRICS, Meters
from holdfast.protocol.ids import SnapshotId
from prometheus_client.parser import text_string_to_metric_families

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = DEPLOY / "prometheus" / "alerts.yaml"
RULES_TEST = Path(__file__).with_name("alerts_test.yaml")
OF_THE_SCRAPE = {"job", "instance"}  # labels that Prometheus gives to every sample

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no promtool here (Debian: apt-get install prometheus)"
)


def whole_text() -> str:
    """What a daemon answers at /metrics when it has something to say of every metric."""
    job = {
        "name": "gpt", "ranks": 2, "committed_step": 7, "more_losses": 1, "snapshot_bytes": 100, "digest_failures": 0,
        "damaged_chunks": 0, "repaired_chunks": 0, "disagreeing_stripes": 0, "scrub_age_s": 1.5, "protect_s": 0.25,
        "drill": {"proven_step": 6, "survives": 1, "age_s": 9.0, "failures": 0, "rebuild_bytes_per_s": 1e9},
        "reprotection": {"nodes": ["b"], "total_chunks": 8, "done_chunks": 3, "state": "failed"},
        "durable": {"step": 5, "age_s": 60.0, "failures": 0},
    }  # fmt: skip
    node = {
        "name": "a", "state": "up", "arena_bytes": 4096, "budget_bytes": 8192, "engine": "native", "worker_session": 2,
        "jobs": {"gpt": {"lost_bytes": 4, "rebuilt_bytes": 1}},
    }  # fmt: skip
    meters = Meters(chunk_bytes=10, version="1.2.3", engine_detail="avx2")
    for name, (kind, _) in METRICS.items():
        label = {"holdfast_refused_total": "reason"}.get(name, "kind" if "_work_" in name else "job")
        labels = {} if name in {"holdfast_sent_bytes_total", "holdfast_received_bytes_total"} else {label: "gpt"}
        if kind == "histogram":
            meters.observe(name, 0.3, **labels)
        elif kind == "counter":
            meters.add(name, 1, **labels)
    for step in (1, 2):  # the first is taken up from a predecessor, the second seen to commit
        committed = JobRecord(
            name="gpt", attempt=1, current_layout_id=None, layouts=(), committed=SnapshotId(1, step),
            committed_layout_id=1, given_up=(), slots=(), closed=False,
        )  # fmt: skip
        ledger = LedgerRecord(cluster="lab", epoch=1, node=0, incarnation=1, worker_session=1, jobs=(committed,))
        meters.wrote(ledger, {"gpt": 0.1})
    return meters.text({"verdict": "DEGRADED", "seen_by": "a", "nodes": [node], "jobs": [job]})


@pytest.fixture(scope="module")
def labels() -> dict[str, set[str]]:
    """The labels of every sample that there can be, by its name."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(whole_text()):
        for sample in family.samples:
            found.setdefault(sample.name, set(OF_THE_SCRAPE)).update(sample.labels)
    return found


def below(expression: Any) -> list[Any]:
    """A parsed expression and all its parts."""
    found: list[Any] = []
    promql_parser.walk(expression, found.append)
    return found


def asked(expression: str, labels: dict[str, set[str]]) -> set[str]:
    """The samples that an expression asks for, after a look at the labels that it uses."""
    selectors = [part for part in below(promql_parser.parse(expression)) if hasattr(part, "matchers")]
    for selector in selectors:
        assert selector.name in labels, f"no daemon has {selector.name}"
        assert {matcher.name for matcher in selector.matchers.matchers} <= labels[selector.name]
    for part in below(promql_parser.parse(expression)):
        if isinstance(part, promql_parser.AggregateExpr) and part.modifier is not None:
            for selector in (one for one in below(part.expr) if hasattr(one, "matchers")):
                assert set(part.modifier.labels) <= labels[selector.name], (expression, selector.name)
    return {selector.name for selector in selectors}


def shown(expression: str, labels: dict[str, set[str]]) -> set[str]:
    """The labels that the result of an expression has."""
    for part in below(promql_parser.parse(expression)):  # the outermost comes first
        if isinstance(part, promql_parser.AggregateExpr):
            return set() if part.modifier is None else set(part.modifier.labels)
    return set.intersection(*(labels[name] for name in asked(expression, labels)))


def metric_of(sample: str) -> str:
    return sample if sample in METRICS else re.sub("_(bucket|sum|count)$", "", sample)


def dashboard() -> list[dict[str, Any]]:
    panels: list[dict[str, Any]] = json.loads((DEPLOY / "grafana" / "holdfast.json").read_text())["panels"]
    return panels


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_the_dashboard_asks_for_what_there_is_and_shows_nearly_all_of_it(labels: dict[str, set[str]]) -> None:
    targets = [target for panel in dashboard() for target in panel["targets"]]
    found = {metric_of(name) for target in targets for name in asked(target["expr"], labels)}
    assert len(found) >= 0.8 * len(METRICS), sorted(set(METRICS) - found)
    for target in targets:
        assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= shown(target["expr"], labels), target


def test_panels_have_names_of_their_own_and_do_not_overlap() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in dashboard():
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
    assert len({panel["id"] for panel in dashboard()}) == len({panel["title"] for panel in dashboard()})


def test_alerts_ask_for_what_there_is_and_say_what_to_do(labels: dict[str, set[str]]) -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(names) == len(set(names)) >= 8
    for rule in rules():
        assert asked(rule["expr"], labels), rule["alert"]
        assert rule["labels"]["severity"] in {"warning", "critical"}
        said = rule["annotations"]["summary"] + rule["annotations"]["description"]
        assert set(re.findall(r"\$labels\.(\w+)", said)) <= shown(rule["expr"], labels), rule["alert"]
        assert rule["annotations"]["description"]


def test_a_wrong_name_label_or_word_is_found(labels: dict[str, set[str]]) -> None:
    for wrong in ("max(holdfast_verdicts)", "max by (kind) (holdfast_node_up)", 'holdfast_node_up{nodes="a"}'):
        with pytest.raises(AssertionError):
            asked(wrong, labels)
    with pytest.raises(ValueError, match="invalid promql"):
        asked("max by job (holdfast_verdict)", labels)


def test_the_scrape_example_keeps_the_names_of_training_jobs() -> None:
    jobs = yaml.safe_load((DEPLOY / "prometheus" / "scrape.yaml").read_text())["scrape_configs"]
    assert jobs[0]["static_configs"][0]["targets"] == ["127.0.0.1:9470"]
    assert jobs[0]["honor_labels"] is True  # or Prometheus calls ours exported_job, and every rule sees one job


@needs_promtool
def test_promtool_takes_rules_and_metrics_and_the_rules_fire_when_they_should() -> None:
    checks = (["check", "rules", str(RULES)], ["check", "metrics"], ["test", "rules", str(RULES_TEST)])
    for check in checks:
        done = subprocess.run(["promtool", *check], capture_output=True, text=True, check=False, input=whole_text())
        assert done.returncode == 0, (check, done.stdout + done.stderr)
