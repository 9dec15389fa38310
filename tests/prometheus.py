"""A real Prometheus with the shipped configuration, which scrapes what the tests name."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from examples.quickstart.quickstart import free_ports
from tests.hosts import END_SECONDS, ROOT, START_SECONDS, wait_for
from tests.needs import needs

CONFIG = ROOT / "deploy/prometheus/prometheus.yaml"
DISCOVERY = "prom_metrics_service_discovery.json"
"""The file in which Ray keeps the addresses of its nodes, below its temporary folder."""
PACKAGE = "Prometheus and promtool (Debian's prometheus)"


@dataclass(frozen=True)
class Prometheus:
    url: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The samples of an instant query; fails where Prometheus does not take the expression."""
        reply = httpx.post(f"{self.url}/api/v1/query", data={"query": expression}, timeout=30, trust_env=False)
        assert reply.is_success, f"{expression}: {reply.text}"
        return reply.json()["data"]["result"]

    def rules(self) -> list[dict[str, Any]]:
        """All alerts, with their state and health."""
        return [rule for group in self.get("rules")["groups"] for rule in group["rules"]]

    def get(self, path: str) -> Any:
        return httpx.get(f"{self.url}/api/v1/{path}", timeout=30, trust_env=False).json()["data"]


@contextmanager
def prometheus(ray_folder: Path, folder: Path) -> Iterator[Prometheus]:
    """Scrapes every second what Ray's service discovery in its temporary folder names, with the shipped alerts."""
    needs(shutil.which("prometheus") is not None, PACKAGE)
    shutil.copytree(CONFIG.parent, folder / "prometheus")
    text = CONFIG.read_text(encoding="utf-8").replace("/tmp/ray/", f"{ray_folder}/")
    config = yaml.safe_load(re.sub(r"interval: \d+s", "interval: 1s", text))
    assert DISCOVERY in str(config) and str(ray_folder) in str(config)
    (folder / "prometheus/prometheus.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (port,) = free_ports(1)
    log = folder / "prometheus.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder}/prometheus/prometheus.yaml",
                f"--storage.tsdb.path={folder}/prometheus/data",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        found = Prometheus(f"http://127.0.0.1:{port}")
        wait_for(lambda: _is_ready(found), START_SECONDS, process, log)
        yield found
    finally:
        process.terminate()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _is_ready(found: Prometheus) -> bool:
    try:
        return httpx.get(f"{found.url}/-/ready", timeout=5, trust_env=False).is_success
    except httpx.TransportError:
        return False


def filled(expression: str) -> str:
    """An expression of a dashboard with its variables as "All" of them, as Grafana would send it."""
    return re.sub(r"\$(base|model|run)\b", ".*", expression).replace("$__rate_interval", "1m")
