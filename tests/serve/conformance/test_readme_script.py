"""The script in README, run as it is printed there: only the address, the key and the model are those of the test."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.conformance.conformance_server import conformance_server

pytestmark = pytest.mark.multiprocess

README = Path(__file__).resolve().parents[3] / "README.md"
CHANGED = ('base_url="http://localhost:8000/v1", api_key="KEY"', 'MODEL = "llama-3.1-8b-instruct"')


def script() -> str:
    blocks: list[str] = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (found,) = (block for block in blocks if "fine_tuning" in block)
    return found


def test_the_script_of_the_readme_runs_after_two_lines_were_changed(tmp_path: Path) -> None:
    code = script()
    address, model = CHANGED
    assert [sum(line in one for one in code.splitlines()) for line in CHANGED] == [1, 1]
    with conformance_server(tmp_path) as server:
        code = code.replace(address, f"base_url={server.url!r}, api_key={server.key!r}")
        code = code.replace(model, f"MODEL = {server.model!r}")
        ran = subprocess.run(
            [sys.executable, "-c", code], cwd=server.folder, capture_output=True, text=True, check=False, timeout=120
        )
    assert ran.returncode == 0, ran.stderr[-4000:]
    lines = ran.stdout.splitlines()
    assert lines[0] == "The job has successfully completed" and lines[-1] == "Hello"
