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
from serve.inference.bases import load_base
from serve.inference.models import ServedModels
from serve.settings import BaseSettings, ServeSettings
from tests.browser import chromium, page_at, served
from tests.serve.fine_tuning.file_world import EXAMPLE, jsonl, write_tiny_base
from tests.serve.fine_tuning.job_world import World, make_world
from tests.serve.test_health import Idle

pytestmark = pytest.mark.multiprocess  # the browser's

KEY = "a-key-of-this-test"
GOOD = [{"messages": [{"role": "user", "content": f"Question {n}?"}, *EXAMPLE["messages"][1:]]} for n in range(12)]
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
    base = BaseSettings(base=str(write_tiny_base(tmp_path_factory.mktemp("base"))), name="tiny")
    settings = ServeSettings.model_validate(
        {
            "storage": world.storage.root,
            "api_key": KEY,
            "database": str(world.engine.url),
            "bases": [base],
            "fine_tuning": {"organization": "acme", "templates": {"tiny": {"parallel": {"use_gpu": False}}}},
        }
    )
    api = create_api(ServedModels(Registry(world.storage), [load_base(base)]), {"tiny": Idle()}, settings)
    with served(api) as address:
        yield Server(address, world, done, running, failed)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def page(browser, server):
    with page_at(browser, f"{server.url}/jobs") as page:
        yield page


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
    row.get_by_role("button", name="Show errors").click()
    row.locator(".errors").get_by_text("Line 1").wait_for()
    with page.expect_download() as download:
        row.get_by_role("button", name="Download").click()
    assert download.value.suggested_filename == "bad.jsonl"
    row.get_by_role("button", name="Delete").click()
    page.locator("#sure-yes").click()
    row.wait_for(state="detached")


def drop_files(page, files: list[dict[str, str]]) -> None:
    page.evaluate(
        """files => {
            const transfer = new DataTransfer();
            for (const file of files) transfer.items.add(new File([file.content], file.name));
            const drop = document.querySelector("#drop");
            for (const name of ["dragenter", "dragover", "drop"])
                drop.dispatchEvent(new DragEvent(name, { bubbles: true, cancelable: true, dataTransfer: transfer }));
        }""",
        files,
    )


def test_dropped_and_chosen_files_are_uploaded_and_their_errors_shown_by_line(page, server):
    give_key(page)
    page.get_by_role("tab", name="Files").click()
    bad = jsonl(*GOOD, {"messages": [{"role": EVIL, "content": "x"}]}, {"messages": 1}).decode()
    drop_files(
        page, [{"name": "dropped.jsonl", "content": jsonl(*GOOD).decode()}, {"name": "wrong.jsonl", "content": bad}]
    )
    good = page.locator(".upload").filter(has_text="dropped.jsonl")
    good.locator(".status.processed").wait_for()
    good.get_by_text("12 valid examples").wait_for()
    wrong = page.locator(".upload").filter(has_text="wrong.jsonl")
    wrong.locator(".errors").get_by_text("Line 14").wait_for()
    wrong.locator(".errors").get_by_text("unrecognized_role").wait_for()
    assert page.title() == "Fine-tuning"
    wrong.get_by_role("button", name="Hide").click()
    page.locator("#chooser").set_input_files(
        [{"name": "chosen.jsonl", "mimeType": "application/jsonl", "buffer": jsonl(*GOOD, *GOOD)}]
    )
    page.locator("#files tr").filter(has_text="chosen.jsonl").locator(".status.processed").wait_for()
    page.locator("#chooser").set_input_files([{"name": "empty.jsonl", "mimeType": "application/jsonl", "buffer": b""}])
    page.locator(".upload .reason").get_by_text("file is empty").wait_for()
    page.evaluate("showTab('jobs')")


def test_a_job_is_estimated_and_then_created(page, server):
    give_key(page)
    page.get_by_role("tab", name="Files").click()
    drop_files(page, [{"name": "for-a-job.jsonl", "content": jsonl(*GOOD).decode()}])
    page.locator(".upload .status.processed").wait_for()
    page.get_by_role("tab", name="Jobs").click()
    page.get_by_role("button", name="New job").focus()
    page.keyboard.press("Enter")
    dialog = page.locator("#create-dialog")
    dialog.get_by_label("Name of the model (suffix)").fill("desk")
    option = dialog.locator("#create-training option").filter(has_text="for-a-job.jsonl").first
    dialog.locator("#create-training").select_option(option.get_attribute("value"))
    dialog.get_by_label("Epochs").fill("2")
    dialog.get_by_label("Metadata").fill("no pair")
    page.keyboard.press("Tab")
    dialog.get_by_role("button", name="Estimate").click()
    dialog.locator(".reason").get_by_text('"no pair" is no pair').wait_for()
    assert not dialog.get_by_role("button", name="Create job").is_visible()
    dialog.get_by_label("Metadata").fill("team=support")
    dialog.locator("#create-validation").select_option(option.get_attribute("value"))
    dialog.get_by_role("button", name="Estimate").click()
    dialog.locator(".reason").get_by_text("training_file").wait_for()  # what is trained on cannot validate, too
    assert not dialog.get_by_role("button", name="Create job").is_visible()
    dialog.locator("#create-validation").select_option("")
    dialog.get_by_role("button", name="Estimate").click()
    dialog.get_by_text("would start at once").wait_for()
    assert "n_epochs: 2" in dialog.locator("#estimate").inner_text()
    page.keyboard.press("Enter")  # the button that creates the job has the focus
    page.locator("#detail dd").get_by_text("the check of its files").wait_for()
    assert page.locator(".job[aria-current=true]").get_by_text("waits for the check of its files").count() == 1
    made = httpx.get(f"{server.url}/v1/fine_tuning/jobs?limit=1", headers={"authorization": f"Bearer {KEY}"}).json()
    job = server.world.records.find(made["data"][0]["id"])
    assert job.request["suffix"] == "desk" and job.metadata == {"team": "support"}
    page.get_by_role("button", name="Cancel job").click()
    page.locator("#sure-yes").click()
    page.locator("#detail .bar .status.cancelled").wait_for()


def test_a_waiting_job_shows_its_place(page, server):
    world = server.world
    world.clock.forward(60)  # the lease of the controller before
    waiting = world.until(world.job("d"), "queued", world.controller())
    kept = {"place": 3, "waits_for": "room for 2 workers", "estimated_start": 1_900_000_000}
    assert world.records.change(waiting, waiting=kept) is not None
    give_key(page)
    choose(page, waiting)
    page.locator("#detail dd").get_by_text("place 3 · room for 2 workers (since").wait_for()
    page.locator("#detail dd").get_by_text("2030").wait_for()
    page.locator(".job").get_by_text("place 3 · waits for room for 2 workers").wait_for()
    world.records.change(world.find(waiting), "cancelled")


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
