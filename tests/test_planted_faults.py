"""Every planted fault can still be planted, and the tests that are to catch it are still there."""

import ast
import shutil
from pathlib import Path

import pytest

from tests.planted_faults import FAULTS, PRODUCT, ROOT, Fault, caught_by, plant


def functions_of(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_there_are_thirty_six_of_as_many_names() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) == 36


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_can_be_planted_and_its_tests_exist(fault: Fault, tmp_path: Path) -> None:
    assert fault.file.startswith(tuple(f"{package}/" for package in PRODUCT))
    planted = tmp_path / fault.file
    planted.parent.mkdir(parents=True)
    shutil.copyfile(ROOT / fault.file, planted)
    plant(fault, tmp_path)
    text = planted.read_text(encoding="utf-8")
    assert text != (ROOT / fault.file).read_text(encoding="utf-8")
    ast.parse(text)  # a fault that is no Python would be noticed by any test
    assert 1 <= len(fault.tests) <= 3
    for test in fault.tests:
        file, _, function = test.partition("[")[0].partition("::")
        assert function in functions_of(ROOT / file)


def test_a_fault_whose_text_is_gone_or_ambiguous_is_not_planted(tmp_path: Path) -> None:
    fault = Fault(name="a", file="file.py", old="one", new="two", breaks="", tests=())
    for text in ("three", "one one"):
        (tmp_path / "file.py").write_text(text)
        with pytest.raises(ValueError, match=r"a: 'one' occurs [02] times in file\.py, not once\."):
            plant(fault, tmp_path)
        assert (tmp_path / "file.py").read_text() == text


def test_only_a_test_that_passes_without_the_fault_catches_it() -> None:
    planted = {"a": "failed", "b": "failed", "c": "passed", "d": "skipped", "e": "failed"}
    assert caught_by(planted, {"a": "passed", "b": "failed", "c": "passed", "d": "passed"}) == ["a"]
