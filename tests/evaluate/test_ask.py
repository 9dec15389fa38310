"""Asking: concurrency, retries, answers on storage before they count, and weights that must stay the same."""

import asyncio
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from ft_service.errors import StorageError, UsageError
from ft_service.evaluate.ask import Answers, Endpoint, Identity, ModelChanged, Outcome, Question, ask_now
from ft_service.storage.storage import Storage
from tests.evaluate.fake_server import BASE, FakeServer, busy, question_in, refused


def questions(count: int) -> list[Question]:
    return [Question(BASE, messages=(("user", f"question {number}"),)) for number in range(count)]


def echo_server(**options: object) -> FakeServer:
    return FakeServer({BASE: lambda body: f"answer to {question_in(body)}"}, **options)  # type: ignore[arg-type]


class Waits(list):
    """A sleep that takes no time."""

    async def __call__(self, seconds: float) -> None:
        self.append(seconds)
        await asyncio.sleep(0)


def stored(folder: Path) -> Answers:
    return Answers(Storage(str(folder)), "evaluations/e")


def ask(server: FakeServer, folder: Path, asked: list[Question], **options: object) -> tuple[Outcome, Answers]:
    answers = stored(folder)
    options = {"sleep": Waits(), **options}
    return ask_now(server.endpoint, asked, answers, {}, **options), answers


def test_every_question_is_answered_once_with_bounded_concurrency(tmp_path):
    server = echo_server()
    outcome, answers = ask(server, tmp_path, questions(50), concurrency=4)
    assert outcome == Outcome()
    assert len(server.bodies) == 50
    assert max(server.crowds) == 4
    for number, question in enumerate(questions(50)):
        answer = answers.get(question)
        assert answer is not None and answer.text == f"answer to question {number}"


def test_the_same_question_is_asked_once(tmp_path):
    server = echo_server()
    one = questions(1)[0]
    ask(server, tmp_path, [one, one, replace(one, repeat=1)])
    assert len(server.bodies) == 2


def test_a_question_says_all_that_decides_its_answer():
    one = questions(1)[0]
    others = [
        replace(one, model="other"),
        replace(one, temperature=0.5),
        replace(one, seed=1),
        replace(one, max_tokens=5),
        replace(one, repeat=1),
        replace(one, messages=(("system", "question 0"),)),
        replace(one, messages=(), prompt="question 0"),
        replace(one, messages=(), prompt=(1, 2)),
    ]
    assert len({one.key, *(other.key for other in others)}) == 1 + len(others)


def test_answers_count_once_they_are_on_storage(tmp_path):
    """At every moment that progress is shown, another process finds that many answers."""
    seen = []

    def progress(done: int, total: int) -> None:
        seen.append((done, len(stored(tmp_path)), total))

    ask(echo_server(), tmp_path, questions(100), progress=progress)
    assert seen[-1] == (100, 100, 100)
    assert all(found >= done for done, found, _ in seen)
    assert any(0 < done < 100 for done, _, _ in seen)


def test_what_is_on_storage_is_not_asked_again(tmp_path):
    server = echo_server()
    ask(server, tmp_path, questions(40))
    shown = []
    outcome, answers = ask(server, tmp_path, questions(60), progress=lambda done, total: shown.append((done, total)))
    assert outcome == Outcome()
    assert len(server.bodies) == 60
    assert len(answers) == 60
    assert shown[0] == (40, 60) and shown[-1] == (60, 60)


def test_a_piece_that_was_not_finished_is_no_piece(tmp_path, monkeypatch):
    """A process that is killed while it writes leaves half a file, under the name that the storage gives it."""
    ask(echo_server(), tmp_path, questions(3))
    folder = tmp_path / "evaluations/e/answers"
    left: dict[str, bytes] = {}

    def replace_after_a_look(source: Path, target: str) -> None:
        left[source.name] = source.read_bytes()[:-20] + b"\n"
        source.rename(target)

    monkeypatch.setattr("os.replace", replace_after_a_look)
    ask(echo_server(), tmp_path, questions(4))
    assert left
    for name, content in left.items():
        (folder / name).write_bytes(content)
    assert len(stored(tmp_path)) == 4


def test_a_damaged_piece_is_named(tmp_path):
    ask(echo_server(), tmp_path, questions(3))
    piece = next((tmp_path / "evaluations/e/answers").iterdir())
    piece.write_text(piece.read_text()[:-20] + "\n")
    with pytest.raises(StorageError, match=f"{piece.name}: is damaged"):
        stored(tmp_path)


@pytest.mark.parametrize("fault", [busy(), refused(503, "starting"), httpx.ConnectError("gone"), httpx.ReadTimeout("")])
def test_what_may_pass_is_asked_again_after_a_growing_wait(tmp_path, fault):
    server = echo_server(fault=lambda number: fault if number <= 3 else None)
    waits = Waits()
    outcome, _ = ask(server, tmp_path, questions(1), sleep=waits)
    assert outcome == Outcome()
    assert len(server.bodies) == 4
    assert 0.25 <= waits[0] <= 0.5 and 0.5 <= waits[1] <= 1 and 1 <= waits[2] <= 2


def test_the_server_says_how_long_to_wait(tmp_path):
    answered = iter([busy("7"), busy("Wed, 21 Oct 2026 07:28:00 GMT"), busy("-1")])
    waits = Waits()
    ask(echo_server(fault=lambda number: next(answered, None)), tmp_path, questions(1), sleep=waits)
    assert waits[0] == 7
    assert all(wait < 7 for wait in waits[1:])


def test_a_refused_question_is_named_and_the_others_go_on(tmp_path):
    def too_long(body: dict) -> str:
        return "fine"

    server = FakeServer({BASE: too_long}, fault=lambda number: refused(400, "too long") if number == 5 else None)
    outcome, answers = ask(server, tmp_path, questions(20), concurrency=1)
    assert list(outcome.failures.values()) == ["status 400: too long"]
    assert outcome.stopped is None
    assert len(answers) == 19


def test_a_server_that_goes_away_keeps_what_was_measured(tmp_path):
    """After so many failures in a row the rest is not asked; later the same call asks it."""
    server = echo_server(fault=lambda number: httpx.ConnectError("refused") if number > 10 else None)
    outcome, answers = ask(server, tmp_path, questions(40), concurrency=2)
    assert outcome.stopped is not None and "ConnectError" in outcome.stopped
    assert len(answers) == len(stored(tmp_path)) == 10
    assert len(outcome.failures) == 30
    assert sum("not asked" in reason for reason in outcome.failures.values()) >= 20
    again, answers = ask(echo_server(), tmp_path, questions(40))
    assert again == Outcome()
    assert len(answers) == 40


@pytest.mark.parametrize(
    ("status", "message"), [(401, "wrong key"), (403, "not allowed"), (404, "The model 'x' does not exist.")]
)
def test_what_no_question_can_pass_stops_at_once(tmp_path, status, message):
    server = echo_server(fault=lambda number: refused(status, message))
    outcome, _ = ask(server, tmp_path, questions(30), concurrency=1)
    assert len(server.bodies) == 1
    assert outcome.stopped == f"status {status}: {message}"
    assert len(outcome.failures) == 30


@pytest.mark.parametrize("body", ["{}", "<html>", '{"choices": []}', '{"model": 5, "choices": [{"message": {}}]}'])
def test_a_reply_of_another_shape_is_a_failure_with_a_reason(tmp_path, body):
    server = echo_server(fault=lambda number: httpx.Response(200, text=body))
    outcome, _ = ask(server, tmp_path, questions(1))
    assert "a reply of another shape" in next(iter(outcome.failures.values()))


def test_other_weights_under_the_same_name_stop_everything(tmp_path):
    server = echo_server()

    def change(number: int) -> None:
        if number == 10:
            server.digests[BASE] = "c" * 64

    server.fault = change
    with pytest.raises(ModelChanged, match="other weights answer than before"):
        ask(server, tmp_path, questions(20), concurrency=1)
    assert len(stored(tmp_path)) == 9


def test_answers_of_other_weights_are_not_continued(tmp_path):
    ask(echo_server(), tmp_path, questions(3))
    expected = {BASE: Identity("c" * 64, "b" * 64)}
    with pytest.raises(ModelChanged, match="cccccccc"):
        ask_now(echo_server().endpoint, questions(4), stored(tmp_path), expected)


def test_log_probabilities_of_a_text_are_asked_without_generating(tmp_path):
    server = echo_server(token_logprob={BASE: -2.5})
    question = Question(BASE, prompt="three words here", max_tokens=0)
    _, answers = ask(server, tmp_path, [question])
    assert server.bodies[0]["echo"] is True
    assert server.bodies[0]["logprobs"] == 0
    answer = answers.get(question)
    assert answer is not None and answer.token_logprobs == [None, -2.5, -2.5]


def test_an_answer_that_was_cut_is_known(tmp_path):
    server = echo_server(finish_reason="length")
    _, answers = ask(server, tmp_path, questions(1))
    answer = answers.get(questions(1)[0])
    assert answer is not None and answer.is_cut


def test_the_key_is_sent_and_never_stored(tmp_path):
    seen = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append((str(request.url), request.headers["authorization"]))
        return httpx.Response(200, json={"model": BASE, "choices": [{"message": {"content": "x"}}]})

    endpoint = Endpoint("http://fake", "secret", httpx.MockTransport(handle))
    ask_now(endpoint, questions(1), stored(tmp_path), {})
    assert seen == [("http://fake/v1/chat/completions", "Bearer secret")]
    assert all("secret" not in file.read_text() for file in tmp_path.rglob("*.jsonl"))


def test_an_address_that_is_none_is_refused():
    with pytest.raises(UsageError, match="is no address"):
        Endpoint("http://[::1").client()


def test_a_storage_that_is_away_loses_no_answer(tmp_path, monkeypatch):
    """What could not be written stays, and is written once the storage is back."""
    answers = stored(tmp_path)
    write = Storage.write_bytes
    fails = iter([True])

    def sometimes(self: Storage, path: str, content: bytes) -> None:
        if next(fails, False):
            raise StorageError("the disk is away")
        write(self, path, content)

    monkeypatch.setattr(Storage, "write_bytes", sometimes)
    with pytest.raises(StorageError, match="the disk is away"):
        ask_now(echo_server().endpoint, questions(5), answers, {}, sleep=Waits())
    asyncio.run(answers.flush())
    assert len(stored(tmp_path)) == len(answers) == 5
