"""The commands that the pages show: read from their blocks, and compared with the programs that they name."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import typer

from ft_service.cli.app import app
from tests.hosts import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
JAPANESE = ROOT / "README.ja.md"
_BLOCK = re.compile(r"^```bash *(.*)\n((?:.*\n)*?)```$", re.MULTILINE)
_INLINE = re.compile(r"`((?:ft|ray|serve|make|aws) [^`]+)`")
_SEPARATORS = {";", "&", "&&", "||", "|", "(", ")"}
_SHELL_WORDS = {"for", "do", "done", "then", "fi"}


@dataclass(frozen=True)
class Block:
    page: Path
    mark: str
    """What follows `bash`: see `CONTRIBUTING.md`, Documentation."""
    text: str

    def commands(self) -> list[list[str]]:
        """Words of each command, those in quotes too, as `ray exec` runs them; without variables before it."""
        lines = self.text.replace("\\\n", " ").splitlines()
        found = [words for line in lines for words in _commands_of(line)]
        quoted = [word for words in found if words[:2] == ["ray", "exec"] for word in words[3:]]
        return found + [words for word in quoted for words in _commands_of(word)]


def blocks(page: Path) -> list[Block]:
    return [Block(page, found[1], found[2]) for found in _BLOCK.finditer(page.read_text(encoding="utf-8"))]


def inline_commands(page: Path) -> list[list[str]]:
    """Commands within sentences; they may leave out arguments."""
    text = _BLOCK.sub("", page.read_text(encoding="utf-8")).replace("\n", " ")
    return [words for found in _INLINE.finditer(text) for words in _commands_of(found[1])]


def _commands_of(line: str) -> Iterator[list[str]]:
    reader = shlex.shlex(line, posix=True, punctuation_chars=";&|()")
    reader.whitespace_split = True
    words: list[str] = []
    for word in [*reader, ";"]:
        if word not in _SEPARATORS:
            words.append(word)
            continue
        while words and (words[0] in _SHELL_WORDS or re.fullmatch(r"[A-Z_]+=.*", words[0])):
            words = words[1:] if words[0] != "for" else []
        if words:
            yield words
        words = []


# -- the programs ------------------------------------------------------------------------------------------------------


def problem_of(words: list[str], whole: bool = True) -> str:
    """Why the program named first would not accept the command; empty if it would. Not `whole`: arguments may lack."""
    program = words[0].removeprefix(".venv/bin/").removeprefix("/opt/vllm/bin/")
    if program in ("ft", "ray", "serve"):
        return _of_click(program, words, whole)
    if program == "aws":
        return _of_aws(words)
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        return "" if words[1] in targets else f"no target {words[1]}"
    if program in ("python", "python3", "python3.11", "sbatch", "docker", "kubectl"):
        shipped = re.compile(r"(deploy|jobs|examples|benchmarks|tests)/\S*")
        missing = [word for word in words if shipped.fullmatch(word) and not (ROOT / word).exists()]
        return f"{' '.join(words)}: {', '.join(missing)} is not here" if missing else ""
    return "" if program in OTHERS else f"{words[0]}: unknown program"


OTHERS = {
    "cd",
    "cp",
    "cosign",
    "curl",
    "echo",
    "cyclonedx-py",
    "export",
    "gcloud",
    "git",
    "gpg",
    "hf",
    "inspect-env/bin/pip",
    "mkdir",
    "printf",
    "prometheus",
    "sed",
    "mlflow",
    "pip",
    "pre-commit",
    "sha256sum",
    "source",
    "tar",
    "tensorboard",
    "torchrun",
    "wandb",
    "build/audit/bin/cyclonedx-py",
    "build/audit/bin/pip",
    "build/audit/bin/python",
}
"""Programs of others, which are not read further."""


@cache
def _group(program: str) -> Any:
    if program == "ft":
        return typer.main.get_command(app)
    if program == "ray":
        from ray.scripts.scripts import cli as ray_cli

        return ray_cli
    from ray.serve.scripts import cli as serve_cli

    return serve_cli


def _of_click(program: str, words: list[str], whole: bool) -> str:
    group = _group(program)
    arguments = words[1:]
    context: Any = None
    try:
        while hasattr(group, "commands"):
            if not whole and not arguments:
                return ""
            if group.invoke_without_command and (not arguments or arguments[0].startswith("-")):
                break
            if arguments[:1] == ["--help"]:
                return ""
            if not arguments or arguments[0] not in group.commands:
                return f"no command {' '.join(words)}"
            context = group.make_context(group.name, [arguments[0]], parent=context)
            group = group.commands[arguments[0]]
            arguments = arguments[1:]
        if not whole:
            known = {name for parameter in group.params for name in (*parameter.opts, *parameter.secondary_opts)}
            unknown = [word for word in arguments if word.startswith("-") and word.partition("=")[0] not in known]
            return f"{' '.join(words)}: no option {', '.join(unknown)}" if unknown and "--" not in arguments else ""
        group.make_context(group.name, arguments, parent=context)
    except Exception as error:
        # A file of the reader is not here.
        return "" if "does not exist" in str(error) else f"{' '.join(words)}: {error or type(error).__name__}"
    return ""


def leaf_of(words: list[str]) -> str:
    """`adapters export` of the words of a command of `ft`."""
    group = _group("ft")
    leaf = []
    for word in words[1:]:
        if word not in getattr(group, "commands", {}):
            break
        leaf.append(word)
        group = group.commands[word]
    return " ".join(leaf)


AWS_GLOBAL = {"query", "output", "region", "profile"}
AWS_SECURITY_GROUPS = {"protocol", "port", "cidr", "source-group"}
"""Options of the AWS command line that stand for EC2's `IpPermissions`."""


def _of_aws(words: list[str]) -> str:
    """By the model of the service in botocore, from which the AWS command line makes its options."""
    import botocore.session
    from botocore import xform_name

    if len(words) < 3:
        return ""
    shown = " ".join(words)
    session = botocore.session.get_session()
    name = "s3" if words[1] == "s3api" else words[1]
    if name not in session.get_available_services():
        return f"{shown}: no such service"
    if words[2] == "wait":
        waiters = {xform_name(name, "-") for name in session.get_waiter_model(words[1]).waiter_names}
        return "" if words[3] in waiters else f"{shown}: no such waiter"
    model = session.get_service_model(name)
    names = {xform_name(name, "-"): name for name in model.operation_names}
    if words[2] not in names:
        return f"{shown}: no such operation"
    shape = model.operation_model(names[words[2]]).input_shape
    members = {xform_name(name, "-"): name for name in shape.members}
    given = [word.removeprefix("--").partition("=")[0] for word in words[3:] if word.startswith("--")]
    simple = AWS_SECURITY_GROUPS if "security-group-" in words[2] else set()
    # A flag may have `no-` before it.
    known = set(members) | {f"no-{name}" for name in members} | AWS_GLOBAL | simple
    made_up = {name for name, member in shape.members.items() if member.metadata.get("idempotencyToken")}
    required = {option for option, name in members.items() if name in {*shape.required_members} - made_up}
    wrong = [f"no option --{name}" for name in given if name not in known]
    wrong += [f"without --{name}" for name in sorted(required - set(given))]
    return f"{shown}: {'; '.join(wrong)}" if wrong else ""
