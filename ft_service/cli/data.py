"""`ft data`: check the data, preview the packed rows, write a cleaned copy, split it without leaks."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from ft_service.errors import FtError, ModelError, Problem, SpecError, UsageError
from ft_service.spec.load import load_run_spec, parse_run_spec, settings_in
from ft_service.spec.schema import RunSpec
from ft_service.text import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ft_service.data.guess import Guess

data_app = typer.Typer(help="Check data, preview packed rows, write a cleaned copy, split it.", no_args_is_help=True)
console = Console()
_errors = Console(stderr=True)

What = Annotated[Path, typer.Argument(metavar="SPEC", help="Run spec (YAML), or a data file or folder.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[setting=value]...", help="Settings of the spec to override, such as data.packing=false."),
]
FormatName = Literal["alpaca", "chat", "text"]
Format = Annotated[
    FormatName | None,
    typer.Option("--format", help="For a data file: its format (default: guessed from its first records)."),
]
Columns = Annotated[
    list[str] | None,
    typer.Option("--column", help="For a data file: OURS=FILE'S column name, such as instruction=question."),
]
Base = Annotated[
    str | None, typer.Option("--base", help="For a data file: hub id or checkpoint folder of the tokenizer.")
]
Origin = Annotated[str | None, typer.Option("--source", help="For a data file: where the data comes from.")]
License = Annotated[str | None, typer.Option("--license", help="For a data file: SPDX id of its license.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]

_FEW_SHARDS = 2
_GUESSED_FROM_RECORDS = 100
_DEFAULT_FRACTION = 0.1
REPORT_FILE = "report.html"


@data_app.command()
def check(
    what: What,
    overrides: Overrides = None,
    format: Format = None,
    columns: Columns = None,
    source: Origin = None,
    license: License = None,
    base: Base = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the report and the lists of findings (default: NAME-data-check).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check data as a run does: each finding, its places, why it hurts, what to do. Exit code 1 if a run would stop."""
    spec = _spec(what, overrides, format, columns, base, source, license)
    from ft_service.cli.data_view import show_judgement
    from ft_service.data.check import FINDINGS_FILE
    from ft_service.data.gate.cures import for_command_line
    from ft_service.data.gate.waivers import check_waivers, enforce
    from ft_service.data.prepare import check_dataset
    from ft_service.pages.data_report import render_data_report

    check_waivers(spec.data.waive)
    folder = output or Path(f"{spec.name}-data-check")
    folder.mkdir(parents=True, exist_ok=True)
    with _errors.status("Data: scanning the files") as status:
        judgement = check_dataset(spec, _tokenizer(spec), folder, status.update, _run_tasks)
    if what.suffix not in (".yaml", ".yml"):
        judgement = for_command_line(judgement)
    (folder / REPORT_FILE).write_text(render_data_report(spec.name, judgement, spec.data.waive), encoding="utf-8")
    if as_json:
        print(judgement.model_dump_json(indent=2))
    else:
        show_judgement(spec.name, judgement, spec.data.waive, console)
        console.print(
            f"\n  Report: {folder / REPORT_FILE}\n  All places of findings: {folder / FINDINGS_FILE}", soft_wrap=True
        )
    try:
        enforce(judgement, spec.data.waive, str(folder / REPORT_FILE))
    except FtError:
        raise SystemExit(1) from None


@data_app.command()
def preview(
    what: What,
    overrides: Overrides = None,
    format: Format = None,
    columns: Columns = None,
    base: Base = None,
    records: Annotated[int, typer.Option(min=1, max=1000, help="Number of records from each source.")] = 5,
    html: Annotated[Path | None, typer.Option(help="Write an HTML page instead.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show packed rows as the model sees them: tokens trained on, tokens only read, special tokens, documents."""
    spec = _spec(what, overrides, format, columns, base)
    from ft_service.cli.data_view import rows_as_json, rows_as_page, show_rows
    from ft_service.data.preview import preview as rows_of
    from ft_service.model.base import load_tokenizer, resolve_base

    if spec.model.base == _NO_BASE:
        raise UsageError("--base: missing. A preview needs a tokenizer; name a hub id or a checkpoint folder.")
    rows = rows_of(spec, load_tokenizer(resolve_base(spec.model.base, spec.model.revision, weights=False)), records)
    if html is not None:
        html.write_text(rows_as_page(spec.name, rows), encoding="utf-8")
    if as_json:
        print(json.dumps(rows_as_json(rows), indent=2, ensure_ascii=False))
    elif html is not None:
        console.print(f"Page: {html}", soft_wrap=True, markup=False)
    else:
        show_rows(rows, console)


@data_app.command()
def clean(
    what: What,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder.")],
    overrides: Overrides = None,
    format: Format = None,
    columns: Columns = None,
    source: Origin = None,
    license: License = None,
    base: Base = None,
    redact: Annotated[
        bool, typer.Option("--redact", help="Mask private data in every column, and list each mask.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a cleaned copy, without unusable records and exact copies. Each record left out is listed."""
    spec = _spec(what, overrides, format, columns, base, source, license)
    from ft_service.cli.data_view import show_data_section, sources_as_json
    from ft_service.data.clean import REDACTED_FILE, cleaned_sources
    from ft_service.data.clean import clean as write_clean
    from ft_service.data.read import DECISIONS_FOLDER, LEFT_OUT_FILE

    cleaned = write_clean(spec, out, _run_tasks, _tokenizer(spec), redact)
    train, validation = cleaned_sources(spec, out, cleaned)
    if as_json:
        counts = {"read": cleaned.judgement.read, "left_out": cleaned.left_out, "redacted": cleaned.redacted}
        data = {"train": sources_as_json(train), "validation": sources_as_json(validation)}
        print(json.dumps({**counts, "folder": str(out), "files": dict(cleaned.files), "data": data}, indent=2))
        return
    written = f"{cleaned.written:,} of {cleaned.judgement.read:,} records written to {out}"
    console.print(written, soft_wrap=True, markup=False)
    for code, count in cleaned.left_out.items():
        console.print(f"  {count:,} left out: {code}", highlight=False)
    for code, count in cleaned.redacted.items():
        console.print(f"  {count:,} masked: {code}", highlight=False)
    decisions = out / DECISIONS_FOLDER
    if cleaned.left_out:
        console.print(f"Each record left out, with its reason: {decisions / LEFT_OUT_FILE}", soft_wrap=True)
    if cleaned.redacted:
        console.print(f"Each mask, with its place: {decisions / REDACTED_FILE}", soft_wrap=True)
    show_data_section(train, validation, console)


@data_app.command()
def split(
    what: What,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder.")],
    overrides: Overrides = None,
    format: Format = None,
    columns: Columns = None,
    source: Origin = None,
    license: License = None,
    fraction: Annotated[
        float | None,
        typer.Option(min=0.0001, max=0.5, help="Share of the records for validation (default: the spec's, or 0.1)."),
    ] = None,
    redact: Annotated[bool, typer.Option("--redact", help="Mask private data in every column.")] = False,
    as_json: AsJson = False,
) -> None:
    """Split data into training and validation without leaks: records that ask or say the same stay on one side."""
    spec = _spec(what, overrides, format, columns, None, source, license, needs_base=False)
    from ft_service.cli.data_view import show_data_section, sources_as_json
    from ft_service.data.split import split as write_split
    from ft_service.data.split import split_sources
    from ft_service.spec.schema import ValidationFraction

    if fraction is None:
        validation = spec.data.validation
        fraction = validation.fraction if isinstance(validation, ValidationFraction) else _DEFAULT_FRACTION
    done = write_split(spec, out, fraction, _run_tasks, redact)
    train, held_out = split_sources(spec, out, done)
    if as_json:
        counts = {"train": done.train, "validation": done.validation, "left_out": done.cleaned.left_out}
        data = {"train": sources_as_json(train), "validation": sources_as_json(held_out)}
        print(json.dumps({**counts, "groups": done.groups, "folder": str(out), "data": data}, indent=2))
        return
    console.print(f"{done.train:,} records for training, {done.validation:,} for validation", highlight=False)
    if done.groups:
        groups = counted(done.groups, "group")
        console.print(f"{groups} of records that ask or say the same, each kept on one side", highlight=False)
    for code, count in done.cleaned.left_out.items():
        console.print(f"  {count:,} left out: {code}", highlight=False)
    show_data_section(train, held_out, console)


# -- the spec --------------------------------------------------------------------------------------------------------

_NO_BASE = "none"


def _spec(
    what: Path,
    overrides: list[str] | None,
    format: FormatName | None,
    columns: list[str] | None,
    base: str | None,
    source: str | None = None,
    license: str | None = None,
    needs_base: bool = True,
) -> RunSpec:
    """The spec in a YAML file, or a spec for a single data file."""
    if what.suffix in (".yaml", ".yml"):
        return _load_spec(what, overrides or [], needs_base)
    names = dict(_pair(column) for column in columns or [])
    guess = _guess(what, format, names)
    data = {
        "path": str(what),
        "format": guess.format,
        "columns": guess.columns,
        "source": source,
        "license": license,
    }
    name = "".join(c if c.isascii() and c.isalnum() else "-" for c in what.stem.lower()).strip("-")[:40] or "data"
    document = {"name": name, "model": {"base": base or _NO_BASE}, "data": {"train": [data]}, "storage": "."}
    return parse_run_spec(json.dumps(document), overrides or [])


def _load_spec(path: Path, overrides: Sequence[str], needs_base: bool) -> RunSpec:
    """The spec. Raises `SpecError` with the problems of its settings, of its sources and of the base's folder."""
    from ft_service.data.problems import source_problems

    problems: list[Problem] = []
    where = str(path)
    spec = None
    try:
        spec = load_run_spec(path, overrides)
    except SpecError as error:
        problems += error.problems
        where = error.where
    settings = settings_in(path, overrides)
    problems += source_problems(settings, with_columns=spec is None)
    if needs_base or problems:
        problems += _base_problems(settings.get("model"))
    if spec is None or problems:
        raise SpecError(problems, where)
    return spec


def _base_problems(model: object) -> Iterator[Problem]:
    """A problem if the base is a folder that is not there. Its content is checked where it is read."""
    from ft_service.model.base import looks_like_folder

    base = model.get("base") if isinstance(model, Mapping) else None
    if isinstance(base, str) and looks_like_folder(base) and not Path(base).expanduser().is_dir():
        yield Problem("model.base", base, "no such folder", "Use a model folder or a hub id.")


def _guess(what: Path, format: FormatName | None, names: dict[str, str]) -> "Guess":
    """The format and columns that the options leave open, guessed from the first readable records, and printed."""
    from ft_service.data.files.shard import Fault
    from ft_service.data.guess import complete, merged
    from ft_service.data.read import read_shard, scan
    from ft_service.spec.schema import DataSource

    source = DataSource(path=str(what))
    raw = (raw for shard in scan(0, source).shards for _, raw in read_shard(shard, source))
    first = list(islice((record for record in raw if not isinstance(record, Fault)), _GUESSED_FROM_RECORDS))
    guess = complete(merged(first), format, names)
    if first and (format, names) != (guess.format, guess.columns):
        _errors.print(f"Guessed from the first records: {guess.as_options()}", markup=False, soft_wrap=True)
    return guess


def _pair(column: str) -> tuple[str, str]:
    name, equals, value = column.partition("=")
    if not equals or not name or not value:
        raise UsageError(f"--column = {column!r}: write OURS=FILE'S, such as instruction=question.")
    return name, value


def _tokenizer(spec: RunSpec) -> "PreTrainedTokenizerBase | None":
    """The base's tokenizer. None prints a note that checks which need tokens are skipped."""
    from ft_service.model.base import load_tokenizer, looks_like_folder, resolve_base

    if spec.model.base == _NO_BASE:
        _errors.print("No --base: checks that need a tokenizer are skipped.")
        return None
    try:
        return load_tokenizer(resolve_base(spec.model.base, spec.model.revision, weights=False))
    except ModelError as error:
        if looks_like_folder(spec.model.base):
            raise
        _errors.print(f"No tokenizer of the base: checks that need one are skipped. {error}", markup=False)
        return None


def _run_tasks(task: Callable[[Any, Any], Any], work: Any, items: Sequence[Any]) -> Iterator[Any]:
    """Run few tasks in this process, many on the cluster of RAY_ADDRESS or on all CPUs of this machine."""
    from ft_service.data.tasks import run_locally

    if len(items) <= _FEW_SHARDS:
        return run_locally(task, work, items)
    from ft_service.cluster.ray_cluster import connect, map_on_cluster

    connect()
    return map_on_cluster(task, work, items)
