"""Which code of this project runs: its version, commit and digest, for records and `ft doctor`."""

import functools
import hashlib
import os
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
COMMIT_VARIABLE = "FT_COMMIT"
"""Set for a submitted job, whose copy of the checkout has no history."""
_COMMIT_FILE = "COMMIT"
"""`git archive` writes the commit into it."""
_COMMIT = re.compile(r"[0-9a-f]{40}")
_GIT_SECONDS = 10


@functools.cache
def code_version(package: Path = PACKAGE) -> str:
    """For example 0.1.0+g1a2b3c4d5e6f.code.0123456789ab.

    The digits after g are those of the commit, with `.changed` if the checkout differs from it; they are left out if
    the commit is unknown. Those after code are of a digest over the files of the package: equal for equal code,
    wherever it is installed.
    """
    commit = commit_of(package)
    parts = [f"g{commit[:12]}{commit[40:]}"] if commit else []
    return f"{_version()}+{'.'.join([*parts, 'code', _digest(package)[:12]])}"


def commit_of(package: Path = PACKAGE) -> str | None:
    """40 hex digits, and `.changed` if the checkout differs from that commit; None if nothing tells it."""
    written = (package / _COMMIT_FILE).read_text(encoding="utf-8").strip() if (package / _COMMIT_FILE).exists() else ""
    if _COMMIT.fullmatch(written):
        return written
    return _commit_of_checkout(package) or os.environ.get(COMMIT_VARIABLE) or None


def _commit_of_checkout(package: Path) -> str | None:
    top, _, commit = (_git(package, "rev-parse", "--show-toplevel", "HEAD") or "").strip().partition("\n")
    if not _COMMIT.fullmatch(commit) or Path(top).resolve() != package.parent:
        return None  # no checkout, or another project's, which this one is installed in
    return f"{commit}.changed" if _git(package, "status", "--porcelain", "--", package.name) else commit


def _git(package: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(package.parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _digest(package: Path) -> str:
    """SHA-256 over names and contents of the files, compiled ones and the commit left out."""
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*")):
        name = file.relative_to(package).as_posix()
        if file.is_file() and "__pycache__" not in file.parts and name != _COMMIT_FILE:
            content = file.read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _version() -> str:
    try:
        return version("ft-service")
    except PackageNotFoundError:
        return "0"
