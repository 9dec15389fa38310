"""The page of jobs in a real browser: curves and events, live; keys; two languages; safe against texts."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from ft_service.cluster.queue.usage import OwnerLimits, QueueLimits, write_limits
from ft_service.registry.registry import Registry
from serve.api import create_api
from serve.database.keys import create_key
from serve.fine_tuning.job_records import Job, NewEvent
from serve.inference.models import ServedModels
from serve.settings import ServeSettings
from tests.browser import chromium, served
from tests.serve.fine_tuning.job_world import World, make_world

pytestmark = pytest.mark.multiprocess  # the browser's

KEY = "a-key-of-this-test"
WAIT = 20_000
EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


@dataclass
class Server:
    url: str
    world: World
    done: Job
    """Has succeeded."""
    running: Job
    failed: Job


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    world = make_world(tmp_path_factory.mktemp("jobs"))
    controller = world.controller()
    done = world.until(world.job("a"), "succeeded", controller)
    world.ray.finishes = "failed"
    failed = world.until(world.job("b"), "failed", controller)
    running = world.until(world.job("c"), "running", controller)
    assert world.records.change(running, events=[NewEvent(f"Held up: {EVIL}", level="warn")]) is not None
    create_key(world.engine, "laptop", requests_per_minute=60)
    write_limits(world.storage, QueueLimits(owners={"laptop": OwnerLimits(max_runs=2, max_gpu_hours=10)}))
    settings = ServeSettings.model_validate(
        {
            "storage": world.storage.root,
            "api_key": KEY,
            "database": str(world.engine.url),
            "fine_tuning": {"organization": "acme"},
        }
    )
    api = create_api(ServedModels(Registry(world.storage), []), {}, settings)
    with served(api) as address:
        yield Server(address, world, done, running, failed)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def page(browser, server):
    context = browser.new_context(locale="en-US", viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.set_default_timeout(WAIT)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if "Content Security" in message.text else None)
    page.goto(f"{server.url}/jobs")
    yield page
    context.close()
    assert problems == []


def give_key(page) -> None:
    page.get_by_label("API key").wait_for()
    page.locator("#key").fill(KEY)
    page.keyboard.press("Enter")
    page.locator(".job").nth(2).wait_for()


def choose(page, job: Job) -> None:
    page.locator(f".job[data-id='{job.id}']").click()


def test_without_the_key_the_page_asks_for_it_and_holds_nothing(page, server):
    page.get_by_label("API key").wait_for()
    assert "ftjob" not in page.content()
    page.locator("#key").fill("wrong")
    page.keyboard.press("Enter")
    page.get_by_role("alert").get_by_text("does not accept this key").wait_for()
    give_key(page)


def test_a_finished_job_shows_its_model_its_curve_and_its_events(page, server):
    give_key(page)
    choose(page, server.done)
    page.locator("#detail h2").get_by_text(server.done.alias).wait_for()
    page.locator("#detail .events").get_by_text("The job has successfully completed").wait_for()
    points = page.locator("polyline.train").get_attribute("points").split()
    assert len(points) == 4
    heights = [float(point.split(",")[1]) for point in points]
    assert heights == sorted(heights)  # the loss falls, and y grows downwards
    assert page.locator("circle.valid").count() == 1
    page.locator("#detail table").get_by_text(f"{server.done.alias}:ckpt-step-4").wait_for()
    assert page.get_by_role("button", name="Pause").count() == 0


def test_a_failed_job_shows_its_reason_and_the_filter_selects(page, server):
    give_key(page)
    page.locator("#filter").select_option("failed")
    assert page.locator(".job").count() == 1
    choose(page, server.failed)
    page.locator("#detail .reason").get_by_text("the loss is nan").wait_for()


def test_a_running_job_grows_before_the_eyes_and_is_paused_and_resumed_and_cancelled(page, server):
    give_key(page)
    choose(page, server.running)
    page.locator("#detail .events .warn").get_by_text(EVIL).wait_for()
    assert page.title() == "Fine-tuning"
    before = page.locator("circle.train").count()
    controller = server.world.controller()
    server.world.clock.forward(60)  # the lease of the controller before
    server.world.ray.advance()
    server.world.ray.advance()
    controller.step()
    page.wait_for_function("n => document.querySelectorAll('circle.train').length > n", arg=before)
    page.get_by_role("button", name="Pause").click()
    page.locator("#detail .events").get_by_text("Pause requested").wait_for()
    server.world.until(server.running, "paused", controller)
    page.get_by_role("button", name="Resume").click()
    page.locator("#detail .events").get_by_text("The job was resumed").wait_for()
    page.get_by_role("button", name="Cancel job").click()
    page.locator("#sure-dialog").get_by_role("button", name="No").click()
    page.get_by_role("button", name="Cancel job").click()
    page.locator("#sure-yes").click()
    server.world.until(server.running, "cancelled", controller)
    page.locator("#detail .bar .status.cancelled").wait_for()


def test_files_show_their_errors_and_are_downloaded_and_deleted(page, server):
    give_key(page)
    headers = {"authorization": f"Bearer {KEY}"}
    sent = {"file": ("bad.jsonl", b'{"messages": 1}\n')}
    made = httpx.post(f"{server.url}/v1/files", headers=headers, files=sent, data={"purpose": "fine-tune"})
    assert made.status_code == 200, made.text
    page.get_by_role("tab", name="Files").click()
    row = page.locator("#files tr").filter(has_text="bad.jsonl")
    row.locator(".status.error").wait_for()
    assert "line 1" in row.locator(".reason").inner_text()
    with page.expect_download() as download:
        row.get_by_role("button", name="Download").click()
    assert download.value.suggested_filename == "bad.jsonl"
    row.get_by_role("button", name="Delete").click()
    page.locator("#sure-yes").click()
    page.locator("#files").get_by_text("There are no files here").wait_for()


def test_keys_and_their_jobs_are_shown(page, server):
    give_key(page)
    page.get_by_role("tab", name="Keys and quotas").click()
    row = page.locator("#keys tr").filter(has_text="laptop")
    row.wait_for()
    assert row.locator("td").all_inner_texts()[:6] == ["laptop", "valid", "", "", "all", "60"]
    assert row.locator("td").all_inner_texts()[8:10] == ["2", "0 of 10"]
    root = page.locator("#keys tr").filter(has_text="FT_API_KEY")
    assert "yes" in root.inner_text()


def test_the_page_speaks_japanese_and_fits_a_phone_in_the_dark(page, server):
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 390, "height": 844})
    give_key(page)
    choose(page, server.done)
    page.locator("#language").select_option("ja")
    assert page.title() == "ファインチューニング"
    page.locator("#detail").get_by_text("イベント", exact=True).wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 23, 26)"


def test_a_link_opens_its_job(page, server):
    give_key(page)
    page.goto(f"{server.url}/jobs#{server.failed.id}")
    page.reload()
    page.locator("#detail .reason").get_by_text("the loss is nan").wait_for()
