"""Tasks of Inspect AI: its command is run for both models, and its logs become comparisons like all others."""

import json
import sys
from pathlib import Path

import pytest

from ft_service.errors import UsageError
from ft_service.evaluate.evaluation import Evaluation
from ft_service.evaluate.inspect_tasks import scores_of
from ft_service.evaluate.run import Request, evaluate
from ft_service.evaluate.suite import load_suite
from tests.evaluate.fake_server import ADAPTER, BASE, FakeServer

COMMAND = """#!{python}
import json, os, sys
from pathlib import Path
assert sys.argv[1] == "eval" and sys.argv[2] == "task.py@sums" and Path("task.py").exists(), sys.argv
assert "PYTHONPATH" not in os.environ
options = dict(zip(sys.argv[3::2], sys.argv[4::2]))
model = options["--model"]
with open({calls!r}, "a") as calls:
    calls.write(json.dumps([model, os.environ["FT_BASE_URL"], os.environ["FT_API_KEY"], options["--limit"]]) + "\\n")
if "fail" in {mode!r} and "desk" in model:
    print("Traceback: something", file=sys.stderr)
    print("ConnectionError: the server is gone", file=sys.stderr)
    sys.exit(1)
samples = [
    {{"id": number, "epoch": epoch, "scores": {{"match": {{"value": "C" if number % 4 or "desk" in model else "I"}}}}}}
    for number in range(24) for epoch in (1, 2)
]
log = {{"status": "success", "eval": {{"task": "sums", "task_version": 2, "packages": {{"inspect_ai": "0.3.285"}}}},
       "samples": samples}}
if "error" in {mode!r}:
    log.update(status="error", error={{"message": "ValueError: a bad sample\\nmore"}})
Path(options["--log-dir"], "2026_sums.json").write_text(json.dumps(log))
"""


def suite_with(folder: Path, mode: str = "") -> str:
    command = folder / "inspect"
    command.write_text(COMMAND.format(python=sys.executable, calls=str(folder / "calls"), mode=mode))
    command.chmod(0o755)
    (folder / "task.py").write_text("")
    suite = folder / "suite.yaml"
    suite.write_text("name: other\ninspect_ai: {tasks: [task.py@sums], command: inspect, limit: 24}\n")
    return str(suite)


def run(folder: Path, suite: str) -> Evaluation:
    server = FakeServer({BASE: lambda body: "4", ADAPTER: lambda body: "4"})
    return evaluate(Request(ADAPTER, suite, str(folder / "storage")), server.endpoint)


def test_both_models_are_asked_and_compared_sample_by_sample(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    suite = suite_with(tmp_path)
    evaluation = run(tmp_path, suite)
    assert evaluation.is_complete, evaluation.left_out
    (found,) = evaluation.inspect_ai
    assert (found.name, found.items, found.base, found.adapter) == ("sums (match)", 24, 0.75, 1.0)
    assert (found.won, found.lost, found.verdict) == (6, 0, "better")
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert [call[0] for call in calls] == [f"openai-api/ft/{BASE}", f"openai-api/ft/{ADAPTER}"]
    assert {tuple(call[1:]) for call in calls} == {("http://fake/v1", "none", "24")}
    run(tmp_path, suite)
    assert len((tmp_path / "calls").read_text().splitlines()) == 2  # nothing is asked again


@pytest.mark.parametrize(
    ("mode", "reason"),
    [("fail", "failed (ConnectionError: the server is gone)"), ("error", "sums failed (ValueError: a bad sample)")],
)
def test_a_failure_is_named_and_keeps_what_was_measured(tmp_path, mode, reason):
    evaluation = run(tmp_path, suite_with(tmp_path, mode))
    assert not evaluation.is_complete and evaluation.inspect_ai == []
    assert any(reason in text for text in evaluation.left_out)
    if mode == "fail":
        run(tmp_path, suite_with(tmp_path))
        calls = [json.loads(line)[0] for line in (tmp_path / "calls").read_text().splitlines()]
        assert calls.count(f"openai-api/ft/{BASE}") == 1  # the base had been measured


def test_without_its_environment_the_cure_is_named_before_anything_is_asked(tmp_path):
    suite = tmp_path / "suite.yaml"
    suite.write_text("name: other\ninspect_ai: {tasks: [task.py], command: inspect-env/bin/inspect}\n")
    with pytest.raises(UsageError, match=r"is no program\. Inspect AI needs an environment of its own: python -m venv"):
        run(tmp_path, str(suite))
    assert not (tmp_path / "storage").exists()


def test_paths_begin_at_the_suite(tmp_path):
    settings = load_suite(suite_with(tmp_path)).suite.inspect_ai
    assert settings is not None
    assert (settings.folder, settings.command) == (str(tmp_path), str(tmp_path / "inspect"))
    (tmp_path / "suite.yaml").write_text(
        "name: other\ninspect_ai: {tasks: [task.py], folder: tasks, command: python3}\n"
    )
    settings = load_suite(str(tmp_path / "suite.yaml")).suite.inspect_ai
    assert settings is not None
    assert (settings.folder, settings.command) == (str(tmp_path / "tasks"), "python3")
    with pytest.raises(UsageError, match=r"inspect_ai\.folder = .*tasks': is no folder"):
        run(tmp_path, str(tmp_path / "suite.yaml"))


def test_scores_are_numbers_letters_or_several_by_name():
    samples = [
        {"id": "a", "scores": {"f1": {"value": 0.25}, "parts": {"value": {"style": "P", "facts": True}}}},
        {"id": "a", "scores": {"f1": {"value": 0.75}, "parts": {"value": {"style": "C", "facts": False}}}},
        {"id": "b", "scores": {"f1": {"value": 1}, "words": {"value": "not a score"}}},
        {"id": "c", "scores": None},
    ]
    found = scores_of({"eval": {"task": "t"}, "samples": samples})
    assert {one.metric: one.values for one in found} == {
        "f1": [("a", 0.5), ("b", 1.0)],
        "parts/style": [("a", 0.75)],
        "parts/facts": [("a", 0.5)],
    }
