"""deploy/audit.py: vulnerabilities, accepted ones, and above all a database that was not asked. pip-audit is a fake."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.test_lock import locked
from tests.hosts import ROOT

OK, FOUND, UNKNOWN = 0, 1, 3


def audit(folder: Path, report: object, accepted: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit code and output, in a project with today's lock and a pip-audit that prints `report`."""
    (folder / "deploy").mkdir()
    (folder / "deploy/audit.py").write_text((ROOT / "deploy/audit.py").read_text())
    (folder / "deploy/accepted.json").write_text(json.dumps(accepted or {}))
    (folder / "requirements.lock").write_text((ROOT / "requirements.lock").read_text())
    (folder / "pip_audit").mkdir()
    text = report if isinstance(report, str) else json.dumps(report)
    asked = 'assert sys.argv[1:3] == ["--requirement", "requirements.lock"] and "json" in sys.argv'
    (folder / "pip_audit/__main__.py").write_text(f"import sys\n{asked}\nprint({text!r})\nsys.exit(1)\n")
    command = [sys.executable, "deploy/audit.py"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


def packages(**findings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A report on every package of the lock."""
    return [{"name": name, "version": pin, "vulns": findings.get(name, [])} for name, pin in locked().items()]


CVE = {"id": "PYSEC-2026-1", "aliases": ["CVE-2026-1"], "fix_versions": ["9.9"]}


def test_a_clean_report_on_every_package_is_ok(tmp_path: Path) -> None:
    code, output = audit(tmp_path, {"dependencies": packages(), "fixes": []})
    assert (code, output) == (
        OK,
        f"{len(locked())} of {len(locked())} packages looked up, 0 vulnerabilities not accepted\n",
    )


def test_a_vulnerability_is_printed_with_the_version_that_fixes_it(tmp_path: Path) -> None:
    code, output = audit(tmp_path, {"dependencies": packages(urllib3=[CVE])})
    assert code == FOUND
    assert f"VULNERABLE  urllib3 {locked()['urllib3']}: PYSEC-2026-1, CVE-2026-1; fixed in 9.9\n" in output


def test_an_accepted_one_is_listed_with_its_reason_and_one_that_is_gone_is_named(tmp_path: Path) -> None:
    accepted = {"CVE-2026-1": "only on Windows", "CVE-2020-1": "old"}
    code, output = audit(tmp_path, {"dependencies": packages(urllib3=[CVE])}, accepted)
    assert code == OK
    assert "accepted    CVE-2026-1: only on Windows\n" in output
    assert "unused      CVE-2020-1: no package has it any more." in output


def test_packages_that_the_database_does_not_know_are_no_good_news(tmp_path: Path) -> None:
    """As pip-audit reports behind a mirror of the index, with exit code 0."""
    found = packages()
    found[0] = {"name": found[0]["name"], "skip_reason": "Dependency not found on PyPI and could not be audited"}
    code, output = audit(tmp_path, {"dependencies": found[:-1]})
    assert code == UNKNOWN
    assert (
        f"NOT KNOWN   2 of {len(found)} packages were not looked up: {found[0]['name']}, {found[-1]['name']}\n"
        in output
    )


def test_a_vulnerability_counts_more_than_what_is_not_known(tmp_path: Path) -> None:
    code, output = audit(tmp_path, {"dependencies": packages(urllib3=[CVE])[1:]})
    assert code == FOUND and "NOT KNOWN   1 of" in output


@pytest.mark.parametrize("report", ["", "Traceback: ConnectionError"])
def test_no_report_at_all_has_its_own_exit_code_and_a_cure(tmp_path: Path, report: str) -> None:
    code, output = audit(tmp_path, report)
    assert code == UNKNOWN
    assert "NOT KNOWN   pip-audit gave no report: no output" in output and "reaches its database" in output


def test_every_accepted_vulnerability_has_a_reason() -> None:
    accepted = json.loads((ROOT / "deploy/accepted.json").read_text())
    assert all(len(reason.split()) >= 3 for reason in accepted.values())
