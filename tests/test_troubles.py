"""Every line of docs/troubles.md names the test that holds it."""

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs/troubles.md"


def test_every_line_names_a_test_that_exists() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cases = [row for row in rows if not row.startswith("| case |")]
    missing = []
    for row in cases:
        file, name = row.strip("| ").split(" | ")[-1].split(": ")
        if not re.search(rf"^(async )?def test_{name}\(", (TESTS / file).read_text(encoding="utf-8"), re.MULTILINE):
            missing.append(row)
    assert len(cases) > 40
    assert missing == []
