"""Dashboards and alerts ask only for metrics and labels that the code and Ray export, by Ray's names for them."""

import itertools
import json
import re
import shutil
import subprocess
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import pytest
import ray
import yaml
from ray.util.metrics import Counter, Gauge, Histogram, Metric

import serve.job_metrics
import serve.metrics
from ft_service.cluster import run_metrics, storage_metrics
from tests.hosts import ROOT, wait_for
from tests.needs import needs
from tests.prometheus import CONFIG, DISCOVERY, PACKAGE, filled, prometheus

SECONDS = 60
DASHBOARDS = {
    file.stem: json.loads(file.read_text(encoding="utf-8")) for file in (ROOT / "deploy/grafana").glob("*.json")
}
METRICS: list[Metric] = [
    metric
    for module in (run_metrics, storage_metrics, serve.job_metrics, serve.metrics)
    for metric in (*vars(module).values(), *vars(module).get("_totals", {}).values())
    if isinstance(metric, (Counter, Gauge, Histogram))
]
ENDINGS: dict[type[Metric], tuple[str, ...]] = {
    Counter: ("_total",),
    Gauge: ("",),
    Histogram: ("_bucket", "_sum", "_count"),
}
each_dashboard = pytest.mark.parametrize("dashboard", DASHBOARDS.values(), ids=DASHBOARDS.keys())


def exported() -> dict[str, set[str]]:
    """Names as Prometheus sees them (tests of a running cluster scrape them), with their labels."""
    return {
        f"ray_{metric.info['name']}{ending}": set(metric.info["tag_keys"])
        for metric in METRICS
        for ending in ENDINGS[type(metric)]
    }


def expressions(dashboard: dict[str, Any]) -> list[str]:
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    variables = [one["query"] for one in dashboard["templating"]["list"] if one["type"] == "query"]
    return [*panels, *variables]


def grouped_by(expression: str) -> set[str]:
    """The labels that its samples are grouped by."""
    return {label for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(", ")} - {"le"}


@each_dashboard
def test_every_metric_of_a_dashboard_exists_with_the_labels_that_it_selects_by(dashboard: dict[str, Any]) -> None:
    names = exported()
    for expression in expressions(dashboard):
        used = re.findall(r"\b(ray_\w+)(?:\{([^}]*)\})?", expression)
        assert used, expression
        for name, selectors in used:
            assert set(re.findall(r"(\w+)=~?", selectors)) <= names[name], expression


@each_dashboard
def test_results_are_grouped_and_named_by_labels_that_exist(dashboard: dict[str, Any]) -> None:
    names = exported()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            (name, *_) = re.findall(r"\bray_\w+", target["expr"])
            grouped = grouped_by(target["expr"])
            shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert grouped <= names[name] and shown <= (grouped or names[name]), panel["title"]


def test_every_metric_is_on_a_dashboard() -> None:
    everything = " ".join(expression for dashboard in DASHBOARDS.values() for expression in expressions(dashboard))
    missing = [metric.info["name"] for metric in METRICS if f"ray_{metric.info['name']}" not in everything]
    assert missing == []


@pytest.mark.parametrize(
    ("name", "variables"), [("serving", ["datasource", "base", "model"]), ("training", ["datasource", "run"])]
)
def test_what_a_dashboard_shows_can_be_chosen(name: str, variables: list[str]) -> None:
    assert [one["name"] for one in DASHBOARDS[name]["templating"]["list"]] == variables


@each_dashboard
def test_panels_have_places_and_ids_of_their_own(dashboard: dict[str, Any]) -> None:
    for values in ("id", "title", "gridPos"):
        found = [str(panel[values]) for panel in dashboard["panels"]]
        assert len(set(found)) == len(found)


@pytest.mark.parametrize("module", [run_metrics, storage_metrics])
def test_the_metrics_of_a_run_disappear_with_its_processes(module: ModuleType) -> None:
    """Ray drops a gauge soon after its process, and keeps counters and histograms for as long as the node lives."""
    found = [metric for metric in METRICS if metric in vars(module).values()]
    assert found and all(isinstance(metric, Gauge) for metric in found)


SAMPLES = {"state": "queued", "priority": "high", "outcome": "ok"}


def scraped(number: int) -> str:
    """A page as Ray exports it, with one series of each metric."""
    lines = []
    for metric in METRICS:
        labels = ",".join(f'{label}="{SAMPLES.get(label, "x")}"' for label in metric.info["tag_keys"])
        name = f"ray_{metric.info['name']}"
        if isinstance(metric, Histogram):
            lines += [f'{name}_bucket{{{labels},le="{bound}"}} {number}' for bound in ("1", "+Inf")]
            lines += [f"{name}_sum{{{labels}}} {number}", f"{name}_count{{{labels}}} {number}"]
        elif isinstance(metric, Counter):
            lines.append(f"{name}_total{{{labels}}} {number}")
        else:
            lines.append(f"{name}{{{labels}}} 1")
    return "\n".join([*lines, ""])


def test_a_real_prometheus_fills_every_panel_and_evaluates_every_alert(tmp_path: Path) -> None:
    scrapes = itertools.count(1)

    class Exporter(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = scraped(next(scrapes)).encode()
            self.send_response(200)
            self.send_header("content-type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Exporter)
    Thread(target=server.serve_forever, daemon=True).start()
    discovery = [{"labels": {"job": "ray"}, "targets": [f"127.0.0.1:{server.server_port}"]}]
    (tmp_path / DISCOVERY).write_text(json.dumps(discovery))
    empty = {
        (target["expr"], target["legendFormat"])
        for dashboard in DASHBOARDS.values()
        for panel in dashboard["panels"]
        for target in panel["targets"]
    }
    try:
        with prometheus(tmp_path, tmp_path) as found:

            def has_filled_all() -> bool:
                for expression, legend in tuple(empty):
                    samples = found.query(filled(expression))
                    shown = re.findall(r"\{\{(\w+)\}\}", legend)
                    if samples and all(label in sample["metric"] for sample in samples for label in shown):
                        empty.remove((expression, legend))
                return not empty

            wait_for(has_filled_all, SECONDS)
            wait_for(lambda: {rule["health"] for rule in found.rules()} == {"ok"}, SECONDS)
            assert len(found.rules()) == len(ALERTS)
    finally:
        server.shutdown()
        server.server_close()


# -- alerts ----------------------------------------------------------------------------------------------------------

ALERTS = [
    rule
    for group in yaml.safe_load((ROOT / "deploy/prometheus/alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
]
CASES = Path(__file__).parent / "alerts_test.yaml"
RAYS_OWN = {
    "ray_node_disk_utilization_percentage": "dashboard/modules/reporter/reporter_agent.py",
    "ray_node_mem_used": "dashboard/modules/reporter/reporter_agent.py",
    "ray_node_mem_total": "dashboard/modules/reporter/reporter_agent.py",
    "ray_node_gpus_utilization": "dashboard/modules/reporter/reporter_agent.py",
    "ray_serve_deployment_replica_starts_total": "serve/_private/replica.py",
}
"""Metrics of Ray, and the file of Ray that defines each."""


def test_alerts_ask_for_metrics_that_exist_with_their_labels() -> None:
    names = exported()
    for alert in ALERTS:
        used = re.findall(r"\b(ray_\w+)(?:\{([^}]*)\})?", alert["expr"])
        assert used, alert["alert"]
        for name, selectors in used:
            if name in RAYS_OWN:
                source = (Path(ray.__file__).parent / RAYS_OWN[name]).read_text()
                defined = name.removeprefix("ray_")
                assert f'"{defined}"' in source or f'"{defined.removesuffix("_total")}"' in source, name
            else:
                assert set(re.findall(r"(\w+)=~?", selectors)) <= names[name], alert["alert"]
                assert grouped_by(alert["expr"]) <= names[name], alert["alert"]


def test_alerts_say_what_is_wrong_and_what_to_do() -> None:
    assert len({alert["alert"] for alert in ALERTS}) == len(ALERTS)
    for alert in ALERTS:
        assert set(alert) <= {"alert", "expr", "for", "labels", "annotations"}
        assert alert["labels"]["severity"] in ("page", "ticket")
        assert set(alert["annotations"]) == {"summary", "action"}
        shown = set(re.findall(r"\$labels\.(\w+)", alert["annotations"]["summary"]))
        grouped = grouped_by(alert["expr"])
        assert shown and (shown <= grouped or shown == {"ip"}), alert["alert"]  # nodes have the label ip


def promtool(*arguments: str) -> None:
    needs(shutil.which("promtool") is not None, PACKAGE)
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_takes_the_configuration_with_its_rules() -> None:
    promtool("check", "config", str(CONFIG))


def test_alerts_fire_when_they_should_and_not_before() -> None:
    promtool("test", "rules", str(CASES))


def test_every_alert_has_a_case_where_it_fires_and_one_where_it_does_not() -> None:
    cases = [
        (rule["alertname"], bool(rule.get("exp_alerts")))
        for test in yaml.safe_load(CASES.read_text())["tests"]
        for rule in test["alert_rule_test"]
    ]
    assert {name for name, fires in cases if fires} == {alert["alert"] for alert in ALERTS}
    assert {name for name, fires in cases if not fires} == {alert["alert"] for alert in ALERTS}


# -- the page --------------------------------------------------------------------------------------------------------

PAGE = ROOT / "docs/operations.md"
METRICS_START = "<!-- metrics: made from the code, held by a test -->\n"
ALERTS_START = "<!-- alerts: made from deploy/prometheus/alerts.yaml, held by a test -->\n"
END = "<!-- end -->"


def metrics_table() -> str:
    rows = [
        f"| `ray_{metric.info['name']}{ENDINGS[type(metric)][0].removesuffix('_bucket')}` "
        f"| {', '.join(metric.info['tag_keys'])} | {type(metric).__name__.lower()} | {metric.info['description']} |"
        for metric in METRICS
    ]
    return "\n".join(["| metric | labels | kind | |", "|---|---|---|---|", *rows]) + "\n"


def alerts_table() -> str:
    rows = []
    for alert in ALERTS:
        summary = re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda label: label[1].upper(), alert["annotations"]["summary"])
        cells = (alert["alert"], alert["labels"]["severity"], summary, alert["annotations"]["action"])
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(["| alert | severity | sign | do |", "|---|---|---|---|", *rows]) + "\n"


def test_the_page_lists_every_metric_and_every_alert() -> None:
    page = expected = PAGE.read_text(encoding="utf-8")
    for start, table in ((METRICS_START, metrics_table()), (ALERTS_START, alerts_table())):
        before, _, rest = expected.partition(start)
        _, _, after = rest.partition(END)
        expected = f"{before}{start}{table}{END}{after}"
    if __name__ == "__main__":
        PAGE.write_text(expected, encoding="utf-8")
    else:
        assert page == expected, "run: python -m tests.cluster.test_dashboards"


if __name__ == "__main__":
    test_the_page_lists_every_metric_and_every_alert()
