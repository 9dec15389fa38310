"""What people do whole: the script in README as it is printed there, and `ft migrate` of a job of OpenAI."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from typer.testing import CliRunner

from ft_service.cli.app import app
from tests.migrate.openai_export import GPT, exported
from tests.serve.conformance.conformance_server import ConformanceServer, conformance_server

pytestmark = pytest.mark.multiprocess

README = Path(__file__).resolve().parents[3] / "README.md"
CHANGED = ('base_url="http://localhost:8000/v1", api_key="KEY"', 'MODEL = "llama-3.1-8b-instruct"')


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConformanceServer]:
    with conformance_server(tmp_path_factory.mktemp("flows")) as found:
        yield found


def script() -> str:
    blocks: list[str] = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (found,) = (block for block in blocks if "fine_tuning" in block)
    return found


def test_the_script_of_the_readme_runs_after_two_lines_were_changed(server: ConformanceServer) -> None:
    code = script()
    address, model = CHANGED
    assert [sum(line in one for one in code.splitlines()) for line in CHANGED] == [1, 1]
    code = code.replace(address, f"base_url={server.url!r}, api_key={server.key!r}")
    code = code.replace(model, f"MODEL = {server.model!r}")
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=server.folder, capture_output=True, text=True, check=False, timeout=120
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    lines = ran.stdout.splitlines()
    assert lines[0] == "The job has successfully completed" and lines[-1] == "Hello"


def test_a_job_of_openai_is_carried_over_once(
    server: ConformanceServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FT_API_KEY", server.key)
    content = (server.folder / "train.jsonl").read_bytes()
    two_calls = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}] * 2}
    bad = json.dumps({"messages": [{"role": "user", "content": "twice"}, two_calls]})
    (tmp_path / "file-train.jsonl").write_bytes(content + bad.encode() + b"\n")
    (tmp_path / "jobs.json").write_text(json.dumps([exported()]))
    arguments = ["migrate", "openai", str(tmp_path / "jobs.json"), "--files", str(tmp_path), "--skip-bad-lines"]
    arguments += ["--map", f"{GPT}={server.model}", "--server", server.url, "--json"]
    outcomes = []
    for _ in range(2):
        ran = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert ran.exit_code == 0, ran.output
        (job,) = json.loads(ran.stdout)["jobs"]
        outcomes.append((job["outcome"], job["job"]))
    assert [outcome for outcome, _ in outcomes] == ["created", "exists"] and outcomes[0][1] == outcomes[1][1]
    client = openai.OpenAI(base_url=server.url, api_key=server.key)
    made = client.fine_tuning.jobs.retrieve(outcomes[0][1])
    assert made.metadata == {"team": "desk", "migrated_from": "ftjob-old1"} and made.seed == 42
    assert client.files.content(made.training_file).read() == content
    client.fine_tuning.jobs.cancel(made.id)
