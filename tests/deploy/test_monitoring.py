"""Dashboard and alert rules load, and ask only for metrics that a daemon has."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from holdfast.daemon.shell.metrics import METRICS

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = DEPLOY / "prometheus" / "alerts.yaml"
LABELS = {"job", "node", "kind", "reason", "le", "instance"}


def asked(expression: str) -> set[str]:
    """Metric names of an expression; those of a histogram without their suffix."""
    found = set(re.findall(r"holdfast_[a-z_]+", expression))
    return {re.sub("_(bucket|sum|count)$", "", name) if name not in METRICS else name for name in found}


def dashboard() -> list[dict[str, Any]]:
    panels: list[dict[str, Any]] = json.loads((DEPLOY / "grafana" / "holdfast.json").read_text())["panels"]
    return panels


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_the_dashboard_asks_for_what_there_is_and_shows_nearly_all_of_it() -> None:
    expressions = [target["expr"] for panel in dashboard() for target in panel["targets"]]
    shown = set().union(*map(asked, expressions))
    assert shown <= set(METRICS)
    assert len(shown) >= 0.8 * len(METRICS), sorted(set(METRICS) - shown)


def test_panels_have_names_of_their_own_and_do_not_overlap() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in dashboard():
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
    assert len({panel["id"] for panel in dashboard()}) == len({panel["title"] for panel in dashboard()})


def test_alerts_ask_for_what_there_is_and_say_what_to_do() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(names) == len(set(names)) >= 8
    for rule in rules():
        assert asked(rule["expr"]) <= set(METRICS), rule["alert"]
        assert asked(rule["expr"])
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["description"]
        for used in re.findall(r"\bby \(([a-z, ]+)\)", rule["expr"]):
            assert set(used.split(", ")) <= LABELS


def test_the_scrape_example_is_one() -> None:
    jobs = yaml.safe_load((DEPLOY / "prometheus" / "scrape.yaml").read_text())["scrape_configs"]
    assert jobs[0]["static_configs"][0]["targets"] == ["127.0.0.1:9470"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool here (Debian: apt-get install prometheus)")
def test_promtool_takes_the_rules() -> None:
    done = subprocess.run(["promtool", "check", "rules", str(RULES)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
