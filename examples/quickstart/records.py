"""Instruction records from the documentation of the Python standard library that is installed: real text, real noise.

    docs.jsonl      {"text": ...}                       what the base reads: every documented entry of the training modules
    train.jsonl     {"instruction", "input", "output"}  questions about those entries
    heldout.jsonl   the same, about packages that the other two files never mention

An entry is a module, class, function or method with a docstring. All files follow from the sources alone, so two runs
on one Python write the same bytes.
"""

import ast
import sysconfig
import textwrap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NOT_THE_LIBRARY = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "ensurepip", "turtledemo"}
HELD_OUT_SHARE = 5
"""One top-level package in so many is held out."""
SUMMARY_CHARACTERS = 160

KIND_QUESTION = "What is documented here: a module, a class, a function or a method?"
PARAMETERS_QUESTION = "How many parameters does it take besides self: none, one, two or more?"
ANSWERS = {
    KIND_QUESTION: ("module", "class", "function", "method"),
    PARAMETERS_QUESTION: ("none", "one", "two", "more"),
}


@dataclass(frozen=True)
class Entry:
    """One documented thing. `parameters` counts those of a function or method besides self and cls."""

    module: str
    kind: str
    name: str
    signature: str
    doc: str
    parameters: int | None = None

    @property
    def package(self) -> str:
        return self.module.split(".")[0]

    @property
    def shown(self) -> str:
        """What a question shows: the signature and the docstring's first paragraph, cut to a few lines."""
        summary = " ".join(self.doc.split("\n\n")[0].split())
        return f"{self.signature}\n{textwrap.shorten(summary, SUMMARY_CHARACTERS, placeholder='...')}"


def standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def read_entries(library: Path) -> Iterator[Entry]:
    """Every documented entry below `library`, in order of path and line; tests and bundled applications are left out."""
    for file in sorted(library.rglob("*.py")):
        path = file.relative_to(library)
        if NOT_THE_LIBRARY.isdisjoint(path.parts):
            module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
            tree = ast.parse(file.read_bytes(), str(file))
            if doc := ast.get_docstring(tree):
                yield Entry(module, "module", module, module, doc)
            yield from _members(tree, module, owner="")


def _members(node: ast.AST, module: str, owner: str) -> Iterator[Entry]:
    """The documented classes, functions and methods in a module's or class's body; functions inside functions are not."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            bases = ", ".join(map(ast.unparse, child.bases))
            if doc := ast.get_docstring(child):
                yield Entry(module, "class", owner + child.name, f"{child.name}({bases})", doc)
            yield from _members(child, module, owner=f"{owner}{child.name}.")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            if doc := ast.get_docstring(child):
                kind = "method" if owner else "function"
                signature = f"{child.name}({ast.unparse(child.args)})"
                yield Entry(module, kind, owner + child.name, signature, doc, _count_parameters(child.args))
        else:
            yield from _members(child, module, owner)


def _count_parameters(arguments: ast.arguments) -> int:
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    return sum(argument is not None and argument.arg not in ("self", "cls") for argument in named)


def is_held_out(entry: Entry) -> bool:
    """By top-level package, from its name alone: the same on every machine, and no package is on both sides."""
    return zlib.crc32(entry.package.encode()) % HELD_OUT_SHARE == 1


def questions(entry: Entry) -> Iterator[dict[str, str]]:
    """The questions about one entry, with their answers."""
    yield {"instruction": KIND_QUESTION, "input": entry.shown, "output": entry.kind}
    if entry.parameters is not None:
        answer = ANSWERS[PARAMETERS_QUESTION][min(entry.parameters, 3)]
        yield {"instruction": PARAMETERS_QUESTION, "input": entry.shown, "output": answer}
