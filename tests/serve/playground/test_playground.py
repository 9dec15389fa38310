"""The playground in a real browser: side by side, streamed, in two languages, with a key, and safe against answers."""

import asyncio
from collections.abc import AsyncGenerator, Iterator

import pytest

from ft_service.model.scratch import train_tokenizer
from ft_service.registry.registry import BaseModelRef, Registry
from ft_service.storage.storage import Storage
from serve.api import create_api
from serve.engines.engine import EngineStats, GenerationChunk, GenerationRequest
from serve.inference.bases import ServedBase
from serve.inference.models import ServedModels
from serve.settings import ServeSettings
from tests.browser import chromium, page_at, served

pytestmark = pytest.mark.multiprocess  # the browser's

KEY = "a-key-of-this-test"
EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


class Named:
    """A base that says its name, and its question's length; asked to, it never ends or says something evil."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.requests: list[GenerationRequest] = []
        self.closed = 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        self.requests.append(request)
        try:
            for word in (f"I am {self.name}.", f" Ich höre 日本語 {EVIL}"):
                yield GenerationChunk(word, (5,))
            while request.sampling.seed == 666:
                await asyncio.sleep(0.01)
                yield GenerationChunk("la ", (5,))
            yield GenerationChunk("", (1,), "stop")
        finally:
            self.closed += 1

    async def unload(self, adapter_digest: str) -> None: ...

    async def all_stats(self) -> list[EngineStats]:
        return []


@pytest.fixture(scope="module")
def bases() -> dict[str, Named]:
    return {name: Named(name) for name in ("anna", "bert")}


@pytest.fixture(scope="module")
def url(tmp_path_factory, bases) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer(["hello world"], 280)
    tokenizer.save_pretrained(folder)
    models = [
        ServedBase(
            ref=BaseModelRef(id=name, revision=None, short_name=name, fingerprint=name * 16),
            folder=folder,
            context_length=4096,
            vocab_size=len(tokenizer),
            end_ids=frozenset({1}),
            precision="bf16",
        )
        for name in bases
    ]
    settings = ServeSettings(storage=str(folder), api_key=KEY)
    api = create_api(ServedModels(Registry(Storage(str(folder))), models), bases, settings)
    with served(api) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def page(browser, url):
    with page_at(browser, url) as page:
        yield page


def give_key(page) -> None:
    page.get_by_label("API key").wait_for()
    page.locator("#key").fill(KEY)
    page.keyboard.press("Enter")
    page.locator("#model-0 option").nth(1).wait_for(state="attached")


def ask(page, question: str) -> None:
    page.locator("#question").fill(question)
    page.keyboard.press("Control+Enter")


def test_without_the_key_the_page_asks_for_it_and_holds_nothing(page):
    page.get_by_label("API key").wait_for()
    assert "anna" not in page.content()
    page.locator("#key").fill("wrong")
    page.keyboard.press("Enter")
    page.get_by_role("alert").get_by_text("does not accept this key").wait_for()
    give_key(page)


def test_two_models_answer_side_by_side_and_each_keeps_its_conversation(page, bases):
    give_key(page)
    ask(page, "Who are you?")
    for side, name in enumerate(bases):
        page.locator(f"#talk-{side} .turn.assistant").get_by_text(f"I am {name}.").wait_for()
        page.locator(f"#talk-{side} .facts").get_by_text("3 tokens").wait_for()
    ask(page, "And now?")
    page.locator("#talk-1 .facts").nth(1).wait_for()
    assert len(bases["bert"].requests[-1].prompt_ids) > len(bases["bert"].requests[-2].prompt_ids) + 20


def test_an_answer_is_text_and_never_runs(page):
    give_key(page)
    ask(page, "Be evil")
    page.locator("#talk-0 .facts").wait_for()
    assert EVIL in page.locator("#talk-0 .turn.assistant").inner_text()
    assert page.title() == "Playground"


def test_stop_ends_an_answer_and_its_computing(page, bases):
    give_key(page)
    page.locator("summary").click()
    page.locator("#seed").fill("666")
    closed = [base.closed for base in bases.values()]
    ask(page, "Sing")
    page.locator("#talk-1").get_by_text("la la").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.locator("#talk-1 .facts").get_by_text("stopped").wait_for()
    for _ in range(1000):
        if all(base.closed > before for base, before in zip(bases.values(), closed, strict=True)):
            break
        page.wait_for_timeout(10)
    else:
        raise AssertionError("the engines still answer")


def test_the_page_speaks_japanese_and_fits_a_phone(page):
    page.set_viewport_size({"width": 390, "height": 844})
    give_key(page)
    page.locator("#language").select_option("ja")
    assert page.title() == "プレイグラウンド"
    page.get_by_role("button", name="送信").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.locator("#compare").uncheck()
    assert "両方" not in page.locator("#question").get_attribute("placeholder")
