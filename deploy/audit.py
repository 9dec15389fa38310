"""Ask a database of vulnerabilities about every package of requirements.lock; weekly, from cron or CI.

    python -m venv build/audit && build/audit/bin/pip install pip-audit==2.10.1
    build/audit/bin/python deploy/audit.py

pip-audit alone exits with 0 when the database knows none of the packages, for example behind a mirror of the index. So
this reads its report, and ends with:

    0   every package was looked up, and no vulnerability is known that deploy/accepted.json does not accept
    1   there are vulnerabilities; each is printed with the version that fixes it
    3   the database did not answer, or does not know some packages: nothing is known of those

deploy/accepted.json maps the id of a vulnerability, or one of its aliases, to the reason why the image keeps the
package. An entry that no package has any more is reported, so that the list does not grow.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOCK = "requirements.lock"
ACCEPTED = ROOT / "deploy/accepted.json"
FOUND = 1
UNKNOWN = 3
COMMAND = [sys.executable, "-m", "pip_audit", "--requirement", LOCK, "--require-hashes", "--disable-pip"]
COMMAND += ["--format", "json", "--progress-spinner", "off", "--desc", "off", "--aliases", "on"]


def judged(report: Mapping[str, Any], names: set[str], accepted: Mapping[str, str]) -> tuple[int, list[str]]:
    """Exit code and lines for pip-audit's report on the packages `names`."""
    packages = report["dependencies"]
    lines = []
    used = set()
    for package in packages:
        for vulnerability in package.get("vulns", []):
            ids = [vulnerability["id"], *vulnerability.get("aliases", [])]
            label = f"{package['name']} {package['version']}: {', '.join(ids)}"
            reasons = {one: accepted[one] for one in ids if one in accepted}
            used |= set(reasons)
            if not reasons:
                fixes = ", ".join(vulnerability.get("fix_versions", [])) or "no version yet"
                lines.append(f"VULNERABLE  {label}; fixed in {fixes}")
    found = len(lines)
    lines += [f"accepted    {one}: {accepted[one]}" for one in sorted(used)]
    lines += [
        f"unused      {one}: no package has it any more. Delete it from {ACCEPTED.name}."
        for one in sorted(set(accepted) - used)
    ]
    missing = sorted(names - {package["name"] for package in packages if "vulns" in package})
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        lines.append(f"NOT KNOWN   {len(missing)} of {len(names)} packages were not looked up: {shown}")
    lines.append(
        f"{len(names) - len(missing)} of {len(names)} packages looked up, {found} vulnerabilities not accepted"
    )
    return (FOUND if found else UNKNOWN if missing else 0), lines


def locked_names() -> set[str]:
    lines = (ROOT / LOCK).read_text(encoding="utf-8").splitlines()
    return {line.partition("==")[0] for line in lines if not line.startswith("#")}


def main() -> int:
    done = subprocess.run(COMMAND, cwd=ROOT, capture_output=True, text=True)
    try:
        report = json.loads(done.stdout)
    except ValueError:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        print(f"NOT KNOWN   pip-audit gave no report: {reason}")
        print("Check that pip-audit is installed, and that this machine reaches its database of vulnerabilities.")
        return UNKNOWN
    accepted = json.loads(ACCEPTED.read_text(encoding="utf-8"))
    exit_code, lines = judged(report, locked_names(), accepted)
    print(*lines, sep="\n")
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
