"""Instruction records from the documentation of the installed Python standard library: real text, with its real noise.

    docs.jsonl      {"text"}                            what the base model reads: every documented entry
    train.jsonl     {"instruction", "input", "output"}  questions about those entries
    heldout.jsonl   the same about other packages, which the two files above leave out

An entry is a module, class, function or method with a docstring. The files follow from the library's sources alone.
"""

import ast
import json
import random
import sysconfig
import textwrap
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

QUESTION = "What is documented here: a module, a class, a function or a method?"
ANSWERS = ("module", "class", "function", "method")

TRAIN_PER_ANSWER = 1000
HELD_OUT_PER_ANSWER = 40

DOC_CHARACTERS = 500
SUMMARY_CHARACTERS = 160
NOT_THE_LIBRARY = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "ensurepip", "turtledemo"}


@dataclass(frozen=True)
class Entry:
    """One documented thing. `kind` is one of ANSWERS; `signature` says neither `class` nor `def`."""

    module: str
    kind: str
    signature: str
    doc: str

    @property
    def package(self) -> str:
        return self.module.split(".")[0]


def standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def write_records(folder: Path, library: Path) -> dict[str, int]:
    """Write the three files into `folder`; returns the number of records of each."""
    entries = list(read_entries(library))
    training = [entry for entry in entries if not is_held_out(entry.package)]
    held_out = [entry for entry in entries if is_held_out(entry.package)]
    return {
        "docs.jsonl": _write(folder / "docs.jsonl", ({"text": text(entry)} for entry in training)),
        "train.jsonl": _write(folder / "train.jsonl", map(question, balanced(training, TRAIN_PER_ANSWER))),
        "heldout.jsonl": _write(folder / "heldout.jsonl", map(question, balanced(held_out, HELD_OUT_PER_ANSWER))),
    }


def read_entries(library: Path) -> Iterator[Entry]:
    """Every documented entry below `library`, in order of path and line, without tests and applications."""
    for file in sorted(library.rglob("*.py")):
        path = file.relative_to(library)
        if NOT_THE_LIBRARY.isdisjoint(path.parts):
            module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
            tree = ast.parse(file.read_bytes(), str(file))
            if doc := ast.get_docstring(tree):
                yield Entry(module, "module", module, doc)
            yield from _members(tree, module, in_class=False)


def _members(node: ast.AST, module: str, in_class: bool) -> Iterator[Entry]:
    """The documented classes, functions and methods of a module or class; without those inside functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            if doc := ast.get_docstring(child):
                yield Entry(module, "class", f"{child.name}({', '.join(map(ast.unparse, child.bases))})", doc)
            yield from _members(child, module, in_class=True)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            if doc := ast.get_docstring(child):
                kind = "method" if in_class else "function"
                yield Entry(module, kind, f"{child.name}({ast.unparse(child.args)})", doc)
        elif isinstance(child, ast.stmt | ast.excepthandler):
            yield from _members(child, module, in_class)


def is_held_out(package: str) -> bool:
    """One top-level package in five, chosen by its name: the same on every machine."""
    return zlib.crc32(package.encode()) % 5 == 1


def balanced(entries: list[Entry], per_answer: int) -> list[Entry]:
    """At most `per_answer` entries of each kind, shuffled, so that one constant answer is right for about a quarter."""
    shuffle = random.Random(0)
    shuffled = shuffle.sample(entries, len(entries))
    chosen = [entry for kind in ANSWERS for entry in [e for e in shuffled if e.kind == kind][:per_answer]]
    return shuffle.sample(chosen, len(chosen))


def text(entry: Entry) -> str:
    """An entry as a page of documentation that ends with its index line."""
    return f"{entry.signature}\n{entry.doc[:DOC_CHARACTERS]}\n\n{entry.kind} in module {entry.module}"


def question(entry: Entry) -> dict[str, str]:
    """The question about an entry: its signature and the first paragraph of its docstring, cut to a few lines."""
    summary = textwrap.shorten(entry.doc.split("\n\n")[0], SUMMARY_CHARACTERS, placeholder="...")
    return {"instruction": QUESTION, "input": f"{entry.signature}\n{summary}", "output": entry.kind}


def _write(file: Path, records: Iterable[dict[str, str]]) -> int:
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)
