"""The documents and the checkout agree: docs/layout.md shows the tree on disk, and the commands named exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHOWN_FILE_BY_FILE = ("ft_service", "serve", "jobs")
SUFFIXES = {".py", ".jinja"}
FOLDERS_OF_DATA = {"jobs/specs", "ft_service/evaluate/suites", "ft_service/evaluate/suites/items"}
"""Shown as folders; their files are neither code nor pages."""


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def tree_lines() -> list[str]:
    page = (ROOT / "docs" / "layout.md").read_text(encoding="utf-8")
    return page.split("```")[1].strip("\n").splitlines()


def shown() -> dict[str, str]:
    """Paths of the tree with their comments. Two spaces of indentation are a level; a folder ends with a slash."""
    found: dict[str, str] = {}
    folders: list[str] = []
    for line in tree_lines():
        name, _, comment = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth]
        found["/".join((*folders, name.rstrip("/")))] = comment.strip()
        if name.endswith("/"):
            folders.append(name.rstrip("/"))
    return found


def on_disk() -> set[str]:
    files = {
        path
        for folder in SHOWN_FILE_BY_FILE
        for path in (ROOT / folder).rglob("*")
        if path.suffix in SUFFIXES and path.name != "__init__.py"
    }
    folders = {parent for file in files for parent in file.parents if parent.is_relative_to(ROOT) and parent != ROOT}
    return {path.relative_to(ROOT).as_posix() for path in files | folders}


def test_the_tree_is_the_tree_on_disk() -> None:
    listed = {path for path in shown() if path.split("/")[0] in SHOWN_FILE_BY_FILE}
    assert listed - FOLDERS_OF_DATA == on_disk()


def test_every_line_of_the_tree_has_a_comment() -> None:
    assert [path for path, comment in shown().items() if not comment] == []


def test_everything_else_in_the_tree_exists() -> None:
    assert [path for path in shown() if not (ROOT / path).exists()] == []


def test_every_linked_file_exists() -> None:
    for page in (ROOT / "README.md", ROOT / "README.ja.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        assert [link for link in links if not (page.parent / link).exists()] == [], page.name


def test_every_make_target_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", readme(), re.MULTILINE)) <= targets
