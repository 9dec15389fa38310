"""The page of an adapter: agrees with the stored evaluation, shows hostile answers as text, names what is missing."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from ft_service.cli.app import app
from ft_service.errors import UsageError
from ft_service.evaluate.evaluation import Evaluation, read_results
from ft_service.evaluate.promotion import promote
from ft_service.evaluate.run import Request, evaluate
from ft_service.evaluate.stored import compare_stored
from ft_service.evaluate.summary import sentences
from ft_service.pages.adapter_page import CHART_WIDTH, adapter_page, changes_of, read_adapter, rows_of
from ft_service.pages.lineage import Box, draw_lineage
from ft_service.registry.registry import AdapterRecord, Registry
from ft_service.runs.folder import RunFolder, RunStatus
from ft_service.runs.metrics import JsonlSink
from ft_service.storage.storage import Storage
from tests.browser import chromium
from tests.evaluate.fake_server import BASE, FakeServer, question_in
from tests.evaluate.test_run import SKILLS, solves
from tests.pages.test_run_report import HOSTILE, START, Page, a_plan, steps
from tests.registry.test_registry import DRAFT

SETTINGS = {"stability": {"limit": 8}, "thresholds": {"min_items": 50, "max_forgetting": 0.5}}


class Desk:
    """Published adapters, and evaluations of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.storage = Storage(str(folder / "storage"))
        self.registry = Registry(self.storage)
        self.suite = folder / "suite.yaml"
        self.write_suite()

    def write_suite(self, num_items: int = 60, **settings: Any) -> None:
        items = [
            {
                "id": f"item-{number:03}",
                "skill": SKILLS[number % len(SKILLS)],
                "prompt": f"What is {number} plus {number}?",
                "metric": "number",
                "reference": str(2 * number),
            }
            for number in range(num_items)
        ]
        (self.folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
        self.suite.write_text(yaml.safe_dump({"name": "sums", "items": ["items.jsonl"], **SETTINGS, **settings}))

    def publish(self, rank: int = 4, **draft: object) -> AdapterRecord:
        work = self.folder / f"work-{rank}"
        work.mkdir()
        (work / "adapter_config.json").write_text(json.dumps({"r": rank}))
        return self.registry.publish(work, {**DRAFT, "run_name": "bot", **draft}, "tiny-llama", "# {id}\n")

    def evaluate(self, adapter: AdapterRecord, answer: Any, base: Any = None) -> Evaluation:
        server = FakeServer(
            {BASE: base or solves(0.5, 1), adapter.id: answer},
            digests={BASE: "none", adapter.id: adapter.digest},
            token_logprob={BASE: -2.0, adapter.id: -1.5},
        )
        return evaluate(Request(adapter.id, str(self.suite), self.storage.root), server.endpoint)

    def page(self, *adapters: AdapterRecord) -> str:
        return adapter_page(self.storage, [read_adapter(self.storage, one.id) for one in adapters])


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def assert_inert(html: str) -> None:
    page = Page(html)
    assert not page.names() & {"script", "img", "link", "iframe", "object", "embed", "base", "form"}
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert not {"src", "href", "xlink:href", "action"} & set(attributes)
    assert "url(" not in html and "@import" not in html


def test_the_page_agrees_with_the_stored_evaluation(desk):
    adapter = desk.publish()
    evaluation = desk.evaluate(adapter, solves(0.95, 2))
    text = Page(desk.page(adapter)).text
    for line in sentences(evaluation):
        assert line in text
    for row in (*evaluation.comparison.skills, evaluation.comparison.overall):
        assert row is not None
        figures = f"{100 * row.difference:+.1f} ({100 * row.low:+.1f} to {100 * row.high:+.1f}) "
        assert f"{row.name} {row.items} {100 * row.base:.1f} {100 * row.adapter:.1f} {figures}" in text
    results = read_results(desk.storage, evaluation.id)
    better = sum(result.change > 0 for result in results)
    worse = sum(result.change < 0 for result in results)
    assert better > 5 and worse > 0
    assert f"Became better: {better} items; the 5 largest changes" in text
    assert f"Became worse: {worse} item" in text


def test_answers_are_shown_as_text(desk):
    adapter = desk.publish(run_name="bot", waivers=[waiver(HOSTILE)], datasets=[dataset(HOSTILE)])
    right = solves(1, 1)

    def hostile(body: dict[str, Any]) -> str:
        return HOSTILE if int(question_in(body).split()[2]) % 2 else right(body)

    desk.evaluate(adapter, hostile, base=lambda body: f"{HOSTILE} {right(body)}")
    html = desk.page(adapter)
    assert_inert(html)
    assert Page(html).text.count(HOSTILE) >= 10


def waiver(reason: str) -> dict[str, object]:
    return {"code": "rights.no-license", "severity": "fail", "count": 2, "reason": reason}


def dataset(path: str) -> dict[str, object]:
    return {"path": path, "source": path, "license": path, "records": 900, "digest": "d"}


def test_what_is_missing_is_named_with_its_command(desk):
    adapter = desk.publish()
    html = desk.page(adapter)
    assert_inert(html)
    text = Page(html).text
    assert f"ft evaluate {adapter.id} --suite general-en" in text
    assert f"ft study create NAME --adapters {adapter.id} --base" in text
    assert f"ft adapters promote {adapter.id}" in text
    assert "The folder of its run, bot-1, was deleted." in text


def test_an_evaluation_of_other_weights_is_not_shown(desk):
    adapter = desk.publish()
    other = adapter.model_copy(update={"digest": "f" * 64})
    desk.evaluate(other, solves(1, 1))
    assert "Not evaluated" in Page(desk.page(adapter)).text


def test_items_that_were_deleted_leave_the_rest_of_the_page(desk):
    adapter = desk.publish()
    evaluation = desk.evaluate(adapter, solves(0.95, 2))
    (Path(desk.storage.root) / "evaluations" / evaluation.id / "evaluation.json").unlink()
    text = Page(desk.page(adapter)).text
    assert "The items of this evaluation were deleted." in text
    assert evaluation.forgetting.sentence in text


def test_training_promotion_and_waivers_are_on_the_page(desk):
    run = RunFolder(desk.storage, "bot-1")
    desk.storage.write_json(f"{run.path}/plan.json", a_plan(memory_gib={"total": 40.0}).model_dump(mode="json"))
    status = RunStatus(run_id="bot-1", state="succeeded", time=START)
    desk.storage.write_json(f"{run.path}/status.json", status.model_dump(mode="json"))
    sink = JsonlSink(desk.storage, "bot-1")
    for step in steps({2: 1.9, 4: 1.7, 6: 1.8}):
        sink(step)
    adapter = desk.publish(data_verdict="fail", waivers=[waiver("Asked the owner.")], datasets=[dataset("a/faq.jsonl")])
    desk.evaluate(adapter, solves(0.95, 2))
    promotion = promote(desk.storage, adapter.id)
    text = Page(desk.page(adapter)).text
    assert "best 1.7000 at step 4" in text
    assert "planned 40.00 GiB measured 31.40 GiB" in text
    assert "Data check: fail" in text and "Asked the owner." in text
    assert f"{promotion.alias} answers with this adapter since" in text
    for check in promotion.checks:
        assert f"{check.name} passed {check.detail}" in text
    assert "faq.jsonl" in text and "900 records" in text


def test_adapters_side_by_side_are_compared_on_the_same_items(desk):
    first = desk.publish(4)
    second = desk.publish(8)
    desk.evaluate(first, solves(0.3, 3))
    desk.evaluate(second, solves(0.95, 4))
    (stored,) = compare_stored(desk.storage, first, second)
    overall = stored.comparison.overall
    assert overall is not None and overall.verdict == "better" and overall.items == 60
    html = desk.page(first, second)
    assert_inert(html)
    text = Page(html).text
    assert stored.sentence in text and stored.sentence.startswith(f"{second.id} is better: ")
    assert f"{second.id} against {first.id}: sums" in text
    (reverse,) = compare_stored(desk.storage, second, first)
    assert reverse.comparison.overall is not None
    assert reverse.comparison.overall.difference == -overall.difference
    assert reverse.comparison.overall.verdict == "worse"


def test_only_items_that_stayed_the_same_are_compared(desk):
    first = desk.publish(4)
    second = desk.publish(8)
    desk.evaluate(first, solves(0.3, 3))
    desk.write_suite(40)
    desk.evaluate(second, solves(0.95, 4))
    (stored,) = compare_stored(desk.storage, first, second)
    assert len(stored.results) == 40
    assert any("The suite has changed" in remark for remark in stored.remarks)
    assert "20 answers are left out, because only one of the two answered the item." in stored.remarks


def test_an_adapter_equal_to_another_is_not_called_better(desk):
    first = desk.publish(4)
    second = desk.publish(8)
    for adapter in (first, second):
        desk.evaluate(adapter, solves(0.6, 3))
    (stored,) = compare_stored(desk.storage, first, second)
    assert stored.sentence.startswith("Not settled: +0.0 points")


def test_two_that_no_suite_has_judged_get_the_commands(desk):
    first = desk.publish(4)
    second = desk.publish(8)
    desk.evaluate(first, solves(0.3, 3))
    with pytest.raises(UsageError, match=f"no suite has judged both. Run: ft evaluate {second.id} --suite sums"):
        compare_stored(desk.storage, first, second)
    assert f"Run: ft evaluate {second.id} --suite sums" in Page(desk.page(first, second)).text


def test_the_commands(desk):
    first = desk.publish(4)
    second = desk.publish(8)
    desk.evaluate(first, solves(0.3, 3))
    desk.evaluate(second, solves(0.95, 4))

    def ft(*arguments: str) -> str:
        done = CliRunner().invoke(app, [*arguments, "--storage", desk.storage.root], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    (stored,) = compare_stored(desk.storage, first, second)
    shown = " ".join(ft("compare", first.id, second.id).split())
    assert stored.sentence in shown and "A" in shown
    (as_json,) = json.loads(ft("compare", first.id, second.id, "--json"))
    assert as_json["sentence"] == stored.sentence
    assert as_json["overall"] == stored.comparison.model_dump(mode="json")["overall"]

    written = ft("adapters", "page", first.id).strip()
    assert written.endswith(f"scorecards/{first.id}.html")
    assert desk.storage.read_bytes(f"scorecards/{first.id}.html").decode() == desk.page(first)
    out = desk.folder / "page.html"
    assert ft("adapters", "page", first.id, second.id, "--out", str(out)).strip() == str(out)
    assert "2 adapters side by side" in out.read_text()
    with pytest.raises(UsageError, match="is the same adapter as A"):
        ft("compare", first.id, first.id)
    with pytest.raises(UsageError, match="cannot be written"):
        ft("adapters", "page", first.id, "--out", str(desk.folder / "none" / "page.html"))


def test_intervals_are_drawn_to_scale(desk):
    adapter = desk.publish()
    overall = desk.evaluate(adapter, solves(0.95, 2)).comparison.overall
    assert overall is not None
    table = rows_of([overall.model_copy(update={"difference": 0.1, "low": -0.1, "high": 0.2})])
    (row,) = table.rows
    assert table.limit == 0.2
    assert row.middle - table.zero == pytest.approx(table.zero - row.low)
    assert row.high - table.zero == pytest.approx(2 * (row.middle - table.zero))
    assert 0 < row.low < row.high < CHART_WIDTH
    assert rows_of([]).rows == []


def test_items_that_did_not_change_are_no_changes(desk):
    evaluation = desk.evaluate(desk.publish(), solves(0.5, 1))
    changes = changes_of(read_results(desk.storage, evaluation.id))
    assert (changes.num_improved, changes.num_worsened) == (0, 0)


def test_a_lineage_with_many_sources_stays_readable():
    lineage = draw_lineage(
        [
            [Box("data", f"file-{number}") for number in range(20)],
            [Box("run", "r" * 60), Box("base", "b", is_origin=True)],
        ]
    )
    assert [placed.box.name for placed in lineage.boxes][:4] == ["file-0", "file-1", "17 more", "file-19"]
    assert len(lineage.arrows) == 4
    assert max(len(placed.box.short_name) for placed in lineage.boxes) <= 17
    for placed in lineage.boxes:
        assert placed.x >= 0 and placed.x + lineage.box_width <= lineage.width
        assert placed.y >= 0 and placed.y + lineage.box_height <= lineage.height


def test_in_a_browser_nothing_runs_and_nothing_overflows(desk):
    adapter = desk.publish(datasets=[dataset("tickets.jsonl")])
    desk.evaluate(adapter, lambda body: HOSTILE, base=solves(0.5, 1))
    file = desk.folder / "page.html"
    file.write_text(desk.page(adapter))
    with chromium() as browser:
        for width in (360, 1280):
            page = browser.new_page(viewport={"width": width, "height": 900})
            asked: list[str] = []
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.on("dialog", lambda dialog: pytest.fail(dialog.message))
            page.goto(file.as_uri())
            assert asked == [file.as_uri()]
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.locator("svg.lineage rect").count() == 8
            names = "[...document.querySelectorAll('.figures td:first-child')].map(cell => cell.clientWidth)"
            assert min(page.evaluate(names)) >= 120, "names of figures are broken within words"
            page.close()
