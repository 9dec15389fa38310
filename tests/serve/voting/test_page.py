"""The vote page in a real browser, by keyboard: blind, in two languages, on a phone, safe against answers."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from sqlalchemy import select, text

from serve.database.database import open_database, session
from serve.database.tables import VoteRow
from serve.voting.studies import close_study, delete_rater
from tests.browser import chromium, page_at, served
from tests.serve.voting.voting_world import EVIL, MODELS, make_study, voting_api

pytestmark = pytest.mark.multiprocess  # the browser's

AXES = ("naturalness", "correctness", "stability", "house style")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[tuple[str, str, str]]:
    folder = tmp_path_factory.mktemp("voting")
    database = f"sqlite:///{folder}/service.db"
    with served(voting_api(database, str(folder / "storage"), api_key="a-key")) as url:
        yield url, database, str(folder / "storage")


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def open_page(browser):
    with ExitStack() as pages:
        yield lambda address, **options: pages.enter_context(page_at(browser, address, **options))


def study_at(world, name: str, **study):
    url, database, storage = world
    made = make_study(open_database(database), storage, name=name, **study)
    return made, made.links(url)["anna"]


def votes(made) -> list[VoteRow]:
    with session(made.engine) as opened:
        return list(opened.scalars(select(VoteRow).where(VoteRow.study == made.study.name).order_by(VoteRow.time)))


def progress(page, done: int, total: int) -> None:
    page.locator("#progress-text").get_by_text(f"{done} of {total}", exact=True).wait_for()


def focused(page) -> str:
    return page.evaluate("document.activeElement.id || document.activeElement.name || document.activeElement.tagName")


def test_a_whole_study_by_keyboard_alone(world, open_page):
    made, link = study_at(world, "keys", questions=4)
    page = open_page(link)
    progress(page, 0, 4)
    for done, key in enumerate("1234", 1):
        page.keyboard.press(key)
        progress(page, done, 4)
    page.get_by_role("heading", name="All done. Thank you!").wait_for()
    assert focused(page) == "screen-title"
    assert [vote.outcome for vote in votes(made)] == ["left", "right", "tie", "both bad"]
    assert all(vote.seconds is not None for vote in votes(made))


def test_after_a_vote_the_next_question_has_the_focus_and_is_announced(world, open_page):
    _, link = study_at(world, "focus", questions=3)
    page = open_page(link)
    progress(page, 0, 3)
    page.keyboard.press("2")
    page.get_by_role("status").get_by_text("Saved. Comparison 2 of 3").wait_for()
    assert focused(page) == "question-title"
    order = []
    for _ in range(5):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.innerText"))
    assert [text.split("\n")[-1] for text in order] == [
        "Add a note",
        "A is better",
        "B is better",
        "Tie",
        "Both are bad",
    ]


def test_no_model_is_in_the_page_before_the_vote_and_both_after_it(world, open_page):
    _, link = study_at(world, "blind", questions=2)
    page = open_page(link)
    replies = []
    page.on("response", lambda reply: replies.append(reply.text()) if "/vote/" in reply.url else None)
    progress(page, 0, 2)
    page.keyboard.press("1")
    progress(page, 1, 2)
    assert not any(model in page.content() + "".join(replies) for model in MODELS)
    page.get_by_role("button", name="Show the models").click()
    page.locator("#last").get_by_text("Last comparison: A was").wait_for()
    assert all(model in page.locator("#last").inner_text() for model in MODELS)
    assert not page.get_by_role("button", name="Undo").is_visible()
    page.keyboard.press("1")
    page.get_by_role("heading", name="All done").wait_for()
    assert not any(model in page.locator("#last").inner_text() for model in MODELS)


def test_u_withdraws_the_last_vote_and_it_can_be_given_again(world, open_page):
    made, link = study_at(world, "undo", questions=2)
    page = open_page(link)
    progress(page, 0, 2)
    first = page.locator("#turns").inner_text()
    page.keyboard.press("1")
    progress(page, 1, 2)
    page.keyboard.press("u")
    progress(page, 0, 2)
    assert page.locator("#turns").inner_text() == first
    page.keyboard.press("4")
    progress(page, 1, 2)
    assert [vote.outcome for vote in votes(made)] == ["both bad"]


def test_scores_and_a_note_by_keyboard(world, open_page):
    made, link = study_at(world, "axes", questions=2, axes=AXES)
    page = open_page(link)
    progress(page, 0, 2)
    page.keyboard.press("1")
    page.get_by_role("heading", name="In detail").wait_for()
    assert focused(page) == "axis-0"
    page.keyboard.press("ArrowRight")  # from none to the second
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    page.get_by_role("radio", name="B much better").nth(3).check()
    page.keyboard.press("2")  # a change of mind keeps the scores
    page.get_by_text("Add a note").click()
    page.get_by_label("Note", exact=True).fill("4 typos")
    page.get_by_label("Note", exact=True).press("1")
    page.get_by_role("radio", name="A better").first.focus()
    page.keyboard.press("Enter")
    progress(page, 1, 2)
    (vote,) = votes(made)
    assert vote.outcome == "right" and vote.note == "4 typos1"
    assert vote.scores == {"naturalness": -1, "correctness": -2, "house style": 2}
    assert page.locator("input:checked[type=radio]").count() == 0


def test_answers_are_text_and_never_run(world, open_page):
    made, link = study_at(world, "evil", texts=[(EVIL, EVIL, "</script><script>document.title='owned'</script>")])
    page = open_page(link)
    progress(page, 0, 1)
    assert page.locator("#turns").inner_text() == EVIL
    shown = {page.locator(f"#text-{side}").inner_text() for side in ("left", "right")}
    assert shown == {made.study.comparisons[0].first.text, made.study.comparisons[0].second.text}
    assert "owned" not in page.title() and page.locator("main img, main script").count() == 0


def test_a_vote_that_finds_no_server_is_kept_and_sent_again(world, open_page):
    made, link = study_at(world, "away", questions=2)
    page = open_page(link)
    progress(page, 0, 2)
    page.context.set_offline(True)
    page.keyboard.press("2")
    page.get_by_role("alert").get_by_text("cannot be reached").wait_for()
    assert votes(made) == []
    page.context.set_offline(False)
    assert focused(page) == "retry"
    page.keyboard.press("Enter")
    progress(page, 1, 2)
    assert [vote.outcome for vote in votes(made)] == ["right"]


def test_a_database_that_is_away_is_said_and_the_vote_can_be_sent_again(world, open_page):
    made, link = study_at(world, "database", questions=2)
    page = open_page(link)
    progress(page, 0, 2)
    with made.engine.begin() as connection:
        connection.execute(text("ALTER TABLE study_votes RENAME TO away"))
    page.keyboard.press("3")
    page.get_by_role("alert").get_by_text("Votes cannot be kept at this moment").wait_for()
    with made.engine.begin() as connection:
        connection.execute(text("ALTER TABLE away RENAME TO study_votes"))
    page.get_by_role("button", name="Try again").click()
    progress(page, 1, 2)


def test_a_study_that_cannot_be_opened_now_can_be_opened_later(world, open_page):
    made, link = study_at(world, "later", questions=2)
    with made.engine.begin() as connection:
        connection.execute(text("ALTER TABLE study_votes RENAME TO away"))
    page = open_page(link)
    page.get_by_role("alert").get_by_text("cannot be opened at this moment").wait_for()
    assert not page.get_by_role("button", name="A is better").is_visible()
    with made.engine.begin() as connection:
        connection.execute(text("ALTER TABLE away RENAME TO study_votes"))
    page.keyboard.press("Enter")
    progress(page, 0, 2)


def test_links_that_open_nothing_say_why(world, open_page):
    url, _, _ = world
    made, link = study_at(world, "links", questions=2)
    page = open_page(f"{url}/vote")
    page.get_by_role("heading", name="Open your link").wait_for()
    page = open_page(f"{link}x")
    page.get_by_role("heading", name="This link is not valid").wait_for()
    page = open_page(link)
    progress(page, 0, 2)
    close_study(made.engine, made.storage, "links")
    page.keyboard.press("1")
    page.get_by_role("heading", name="This study has ended").wait_for()
    delete_rater(made.engine, made.storage, "links", "anna")
    page.reload()
    page.get_by_role("heading", name="This link has ended").wait_for()


def test_single_keys_can_be_turned_off(world, open_page):
    made, link = study_at(world, "off", questions=2)
    page = open_page(link)
    progress(page, 0, 2)
    page.get_by_role("button", name="Help").click()
    page.get_by_label("Vote with single keys").uncheck()
    page.get_by_role("button", name="Close").click()
    page.keyboard.press("1")
    page.get_by_role("button", name="Both are bad").click()
    progress(page, 1, 2)
    assert [vote.outcome for vote in votes(made)] == ["both bad"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_speaks_japanese_and_fits_a_phone(world, open_page, scheme):
    made, link = study_at(world, f"phone-{scheme}", questions=2, axes=AXES)
    phone = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True, "color_scheme": scheme}
    page = open_page(link, locale="ja-JP", **phone)
    page.get_by_text("2 件中 0 件").wait_for()
    page.get_by_role("button", name="Aが良い").tap()
    page.get_by_role("heading", name="詳しい評価").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.get_by_role("button", name="投票を保存").tap()
    page.get_by_text("2 件中 1 件").wait_for()
    assert [vote.outcome for vote in votes(made)] == ["left"]
    page.locator("#language").select_option("en")
    page.get_by_role("button", name="A is better").wait_for()
    assert page.evaluate("document.documentElement.lang") == "en"


LUMINANCE = """
() => {
  const channel = (value) => value <= .04045 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4;
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const luminance = (colour) => {
    canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = canvas.getImageData(0, 0, 1, 1).data;
    return .2126 * channel(r / 255) + .7152 * channel(g / 255) + .0722 * channel(b / 255);
  };
  const background = (element) => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if (!/, 0\\)$|transparent/.test(colour)) return colour;
    }
    return "white";
  };
  const weak = [];
  for (const element of document.body.querySelectorAll("*")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.checkVisibility() || element.closest("script, option")) continue;
    const [a, b] = [luminance(getComputedStyle(element).color), luminance(background(element))];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) weak.push(`${element.tagName} ${element.textContent.trim().slice(0, 30)} ${ratio.toFixed(2)}`);
  }
  return weak;
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_a_contrast_of_at_least_four_and_a_half(world, open_page, scheme):
    _, link = study_at(world, f"contrast-{scheme}", questions=3, axes=AXES)
    page = open_page(link, color_scheme=scheme)
    progress(page, 0, 3)
    page.keyboard.press("1")
    page.keyboard.press("Enter")
    progress(page, 1, 3)
    page.keyboard.press("1")
    page.get_by_role("radio", name="Same").first.check()
    assert page.evaluate(LUMINANCE) == []
    page.get_by_role("button", name="Help").click()
    assert page.evaluate(LUMINANCE) == []


def test_every_control_has_a_name_and_every_group_one(world, open_page):
    _, link = study_at(world, "names", questions=2, axes=AXES)
    page = open_page(link)
    progress(page, 0, 2)
    page.keyboard.press("1")
    tree = page.locator("body").aria_snapshot()
    for line in (
        '- heading "Question" [level=2]',
        '- heading "Answer A" [level=3]',
        '- group "Which answer is better?"',
        '- button "A is better" [pressed]',
        '- group "Naturalness Reads as a fluent person writes"',
        '- radio "A much better"',
        '- progressbar "0 of 2"',
        '- region "Question"',
    ):
        assert line in tree, tree
