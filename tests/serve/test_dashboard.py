"""Dashboard and alerts ask only for metrics and labels that the server and Ray export, by Ray's names for them."""

import json
import re
from pathlib import Path

import ray
import yaml
from ray.util.metrics import Counter, Gauge, Histogram

import serve.metrics
from tests.hosts import ROOT

DASHBOARD = json.loads((ROOT / "deploy/grafana/serving.json").read_text())
METRICS = [
    metric
    for metric in (*vars(serve.metrics).values(), *serve.metrics._totals.values())
    if isinstance(metric, (Counter, Gauge, Histogram))
]


def exported() -> dict[str, set[str]]:
    """Names as Prometheus sees them (a test of a running server scrapes them), with their labels."""
    endings = {Counter: ("_total",), Gauge: ("",), Histogram: ("_bucket", "_sum", "_count")}
    return {
        f"ray_{metric.info['name']}{ending}": set(metric.info["tag_keys"])
        for metric in METRICS
        for ending in endings[type(metric)]
    }


def expressions() -> list[str]:
    panels = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    variables = [one["query"] for one in DASHBOARD["templating"]["list"] if one["type"] == "query"]
    return [*panels, *variables]


def test_every_metric_of_the_dashboard_exists_with_the_labels_that_it_selects_by():
    names = exported()
    for expression in expressions():
        used = re.findall(r"\b(ray_\w+)(?:\{([^}]*)\})?", expression)
        assert used, expression
        for name, selectors in used:
            assert set(re.findall(r"(\w+)=~?", selectors)) <= names[name], expression


def test_results_are_grouped_and_named_by_labels_that_exist():
    names = exported()
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            (name, *_) = re.findall(r"\bray_\w+", target["expr"])
            grouped = {label for group in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in group.split(", ")}
            shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert grouped - {"le"} <= names[name] and shown <= names[name], panel["title"]


def test_every_metric_is_on_the_dashboard():
    everything = " ".join(expressions())
    missing = [metric.info["name"] for metric in METRICS if metric.info["name"] not in everything]
    assert missing == []


def test_a_base_and_a_model_can_be_chosen():
    names = [one["name"] for one in DASHBOARD["templating"]["list"]]
    assert names == ["datasource", "base", "model"]


# -- alerts ----------------------------------------------------------------------------------------------------------

ALERTS = [
    rule
    for group in yaml.safe_load((ROOT / "deploy/prometheus/alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
]
RAYS_OWN = {
    "ray_node_disk_utilization_percentage": "dashboard/modules/reporter/reporter_agent.py",
    "ray_node_mem_used": "dashboard/modules/reporter/reporter_agent.py",
    "ray_node_mem_total": "dashboard/modules/reporter/reporter_agent.py",
    "ray_node_gpus_utilization": "dashboard/modules/reporter/reporter_agent.py",
    "ray_serve_deployment_replica_starts_total": "serve/_private/replica.py",
}
"""Metrics of Ray, and the file of Ray that defines each."""


def test_alerts_ask_for_metrics_that_exist_with_their_labels():
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
                grouped = {
                    label for group in re.findall(r"by \(([^)]*)\)", alert["expr"]) for label in group.split(", ")
                }
                assert grouped - {"le"} <= names[name], alert["alert"]


def test_alerts_say_what_is_wrong_and_what_to_do():
    assert len({alert["alert"] for alert in ALERTS}) == len(ALERTS)
    for alert in ALERTS:
        assert set(alert) <= {"alert", "expr", "for", "labels", "annotations"}
        assert alert["labels"]["severity"] in ("page", "ticket")
        assert set(alert["annotations"]) == {"summary", "action"}
        shown = set(re.findall(r"\$labels\.(\w+)", alert["annotations"]["summary"]))
        grouped = {label for group in re.findall(r"by \(([^)]*)\)", alert["expr"]) for label in group.split(", ")}
        assert shown and (shown <= grouped or shown == {"ip"}), alert["alert"]  # nodes have the label ip
