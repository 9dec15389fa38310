"""Write requirements.lock: every package of the image with its version and the hash of its file.

    python deploy/lock.py

pip resolves the project with its optional parts for servers and trackers under constraints.txt, for the platform and
Python it runs on: Linux on x86-64 and Python 3.11, as in deploy/Dockerfile. Only the package index of PyPI is asked.
An editable install cannot use the file, because pip has no hash of a folder; it uses constraints.txt.
"""

import json
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.lock"
EXTRAS = "postgres,tensorboard,wandb,mlflow,otel"
HEADER = """\
# Every package of deploy/Dockerfile's image, with the hash of the file that pip takes (Linux, x86-64, Python 3.11).
# Written by `python deploy/lock.py`; install with `pip install --require-hashes --no-deps -r requirements.lock`.
"""


def lines_of(report: dict[str, object]) -> list[str]:
    """The lines of the lock file from pip's installation report, sorted by name; this project itself is left out."""
    found = {}
    for item in report["install"]:  # type: ignore[attr-defined]
        name = re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower()
        if name == "ft-service":
            continue
        digest = item["download_info"]["archive_info"]["hashes"]["sha256"]
        found[name] = f"{name}=={item['metadata']['version']} --hash=sha256:{digest}"
    return [found[name] for name in sorted(found)]


def main() -> None:
    here = (sys.platform, platform.machine(), sys.version_info[:2])
    if here != ("linux", "x86_64", (3, 11)):
        sys.exit(f"deploy/lock.py: runs on Linux, x86-64 and Python 3.11, which the image has; this is {here}.")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        # Isolated: no index or folder of this machine's pip settings, whose files others could not get.
        command = [sys.executable, "-m", "pip", "--isolated", "install", "--dry-run", "--ignore-installed", "--quiet"]
        command += ["--constraint", "constraints.txt", "--report", str(report), f".[{EXTRAS}]"]
        subprocess.run(command, cwd=ROOT, check=True)
        lines = lines_of(json.loads(report.read_text()))
    LOCK.write_text(HEADER + "\n".join(lines) + "\n")
    print(f"{LOCK.name}: {len(lines)} packages")


if __name__ == "__main__":
    main()
