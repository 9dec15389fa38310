"""docs/cluster.md shows the plan of the 70B run as `ft plan` prints it today, and names node types of cluster.yaml."""

import re

import yaml

from tests.hosts import ROOT
from tests.plan.test_docs import shown

PAGE = ROOT / "docs/cluster.md"


def plan_in_the_page() -> str:
    text = PAGE.read_text(encoding="utf-8")
    (example,) = [block for block in text.split("```") if block.lstrip("\n").startswith("support-bot-70b  fits")]
    return example.strip("\n")


def plan_of_today() -> list[str]:
    """Without the table of memory."""
    lines = shown("lora-70b", ["parallel.num_workers=16"])
    return "\n".join(lines).strip("\n").partition("\n\n One GPU")[0].splitlines()


def test_the_plan_of_the_70b_run_is_of_today() -> None:
    stale = "docs/cluster.md is not what `ft plan` prints now: python -m tests.cluster.test_docs"
    assert plan_in_the_page().splitlines() == plan_of_today(), stale


def test_the_table_of_node_types_is_that_of_the_file() -> None:
    table = PAGE.read_text(encoding="utf-8").split("## What is in cluster.yaml")[1].split("##")[0]
    types = yaml.safe_load((ROOT / "cluster.yaml").read_text())["available_node_types"]
    rows = {row[0]: row[1] for row in re.findall(r"^\| `([a-z0-9-]+)` \|(.*)$", table, re.MULTILINE)}
    assert set(rows) == {name for name in types if not name.endswith("-spot")}
    for name, row in rows.items():
        limit = re.search(r"up to (\d+)", row)
        assert limit is None or int(limit[1]) == types[name]["max_workers"], name


def write() -> None:
    """Put today's plan into the page."""
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text.replace(plan_in_the_page(), "\n".join(plan_of_today())), encoding="utf-8")


if __name__ == "__main__":
    write()
