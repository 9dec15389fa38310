"""The quickstart's records: what they are about, that they can be answered, and that questions are really held out."""

import json
import textwrap
from collections import Counter
from pathlib import Path

import pytest

from examples.quickstart.records import (
    ANSWERS,
    SUMMARY_CHARACTERS,
    is_held_out,
    read_entries,
    standard_library,
    write_records,
)

SOURCE = '''
"""About {package}."""
import os

class Open(os.PathLike, metaclass=type):
    """A class of {package}."""

    def read(self, size=-1, *, block: bool = True):
        """A method of {package}."""

        def helper():
            """Inside a function: nobody can look it up."""

    def undocumented(self): ...

    class Inner:
        """A class in a class of {package}."""

        async def close(self):
            """An async method of {package}."""

try:
    from fast import load
except ImportError:
    def load(path, /):
        """A function of {package}, defined in an except clause."""

if os.name == "posix":
    def fork():
        """A function of {package}, in a condition.

        More about it.
        """
'''


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A library of two packages, of which one is held out, and with tests that are none of its documentation."""
    root = tmp_path / "library"
    for package in ("argparse", "smtplib"):
        (root / package).mkdir(parents=True)
        (root / package / "__init__.py").write_text(textwrap.dedent(SOURCE).format(package=package))
    (root / "smtplib" / "test").mkdir()
    (root / "smtplib" / "test" / "test_smtplib.py").write_text('"""Not documentation."""')
    assert [is_held_out("argparse"), is_held_out("smtplib")] == [False, True]
    return root


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The records of the Python that runs the tests."""
    folder = tmp_path_factory.mktemp("records")
    write_records(folder, standard_library())
    return folder


def read(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_every_documented_module_class_function_and_method_is_an_entry(library: Path) -> None:
    found = [(entry.kind, entry.signature) for entry in read_entries(library) if entry.module == "argparse"]
    assert found == [
        ("module", "argparse"),
        ("class", "Open(os.PathLike)"),
        ("method", "read(self, size=-1, *, block: bool=True)"),
        ("class", "Inner()"),
        ("method", "close(self)"),
        ("function", "load(path, /)"),
        ("function", "fork()"),
    ]


def test_tests_of_the_library_are_not_its_documentation(library: Path) -> None:
    assert {entry.module for entry in read_entries(library)} == {"argparse", "smtplib"}


def test_held_out_packages_appear_in_no_file_that_is_trained_on(library: Path, tmp_path: Path) -> None:
    write_records(tmp_path, library)
    trained = (tmp_path / "docs.jsonl").read_text() + (tmp_path / "train.jsonl").read_text()
    held_out = (tmp_path / "heldout.jsonl").read_text()
    assert "argparse" in trained and "smtplib" not in trained
    assert "smtplib" in held_out and "argparse" not in held_out


@pytest.mark.slow
def test_the_base_reads_nothing_of_the_installed_packages_that_are_held_out(installed: Path) -> None:
    modules = {record["text"].rpartition(" in module ")[2] for record in read(installed / "docs.jsonl")}
    assert len(modules) > 100
    assert not [module for module in modules if is_held_out(module.split(".")[0])]


def test_the_same_library_gives_the_same_files(library: Path, tmp_path: Path) -> None:
    counts = [write_records(tmp_path / name, library) for name in ("first", "second")]
    assert counts[0] == counts[1]
    for name in counts[0]:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


@pytest.mark.slow
def test_the_installed_library_gives_thousands_of_records_and_over_a_hundred_questions(installed: Path) -> None:
    assert len(read(installed / "docs.jsonl")) > 3000
    assert len(read(installed / "train.jsonl")) > 2000
    assert len(read(installed / "heldout.jsonl")) >= 100


@pytest.mark.slow
@pytest.mark.parametrize("file", ["train.jsonl", "heldout.jsonl"])
def test_every_question_names_its_possible_answers_and_has_one_of_them(installed: Path, file: str) -> None:
    for record in read(installed / file):
        assert record["output"] in ANSWERS
        assert all(answer in record["instruction"] for answer in ANSWERS)
        signature, _, summary = record["input"].partition("\n")
        assert signature and not signature.startswith(("def ", "class ", "async "))
        assert len(summary) <= SUMMARY_CHARACTERS


@pytest.mark.slow
def test_always_giving_one_answer_is_right_on_less_than_a_third_of_the_held_out_questions(installed: Path) -> None:
    answers = Counter(record["output"] for record in read(installed / "heldout.jsonl"))
    assert set(answers) == set(ANSWERS)
    assert max(answers.values()) < answers.total() / 3
