"""`ft study`: people compare answers blind, each by a link of their own; what their votes say."""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ft_service.cli.common import (
    DEFAULT_STORAGE,
    AsJson,
    StorageRoot,
    Yes,
    confirm_deletion,
    console,
    new_table,
    print_json,
    print_text,
)
from ft_service.cli.keys import Database, open_service_database
from ft_service.errors import UsageError
from ft_service.storage.storage import Storage
from ft_service.text import counted

if TYPE_CHECKING:
    from serve.voting.studies import StudySummary

study_app = typer.Typer(help="Studies: people compare answers blind. Needs FT_DATABASE_URL.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The study.")]
Server = Annotated[
    str, typer.Option("--server", metavar="URL", help="The server's address, as raters reach it.", envvar="FT_SERVER")
]
_SERVER = "http://127.0.0.1:8000"


@study_app.command("create")
def create(
    name: Name,
    adapters: Annotated[str, typer.Option(metavar="A,B", help="Models to compare, with commas between them.")],
    questions: Annotated[
        str,
        typer.Option(
            metavar="FILE", help="JSON lines; or held-out: validation data of the first adapter's run; or held-out:RUN."
        ),
    ],
    raters: Annotated[str, typer.Option(metavar="a,b,c", help="Names. Each gets a link.")],
    votes_per_item: Annotated[int, typer.Option(min=1, help="Raters who judge each comparison.")] = 3,
    base: Annotated[bool, typer.Option("--base", help="Compare with the base of the adapters, too.")] = False,
    axes: Annotated[
        str, typer.Option(metavar="x,y", help="Scored besides the vote, such as naturalness,correctness,stability.")
    ] = "",
    repeats: Annotated[float, typer.Option(help="Share of a rater's comparisons that are asked again.")] = 0.1,
    controls: Annotated[float, typer.Option(help="Share of comparisons of a model with itself.")] = 0.05,
    attention: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Items with a known right answer, JSON lines.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions at most, drawn by the seed.")] = None,
    title: Annotated[str, typer.Option(help="What raters see; never name the models in it.")] = "",
    reveal: Annotated[
        str, typer.Option(help="When raters may see the models: vote (after each) or end (after all).")
    ] = "vote",
    seed: Annotated[int, typer.Option(help="Of answers, sides and order.")] = 0,
    temperature: Annotated[float, typer.Option(min=0, max=2)] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer; a longer one is cut, and marked.")] = 512,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 8,
    server: Server = _SERVER,
    storage: StorageRoot = DEFAULT_STORAGE,
    database: Database = None,
    as_json: AsJson = False,
) -> None:
    """Ask the models, and open a study. Interrupted, the same command asks only what is missing."""
    from ft_service.evaluate.ask import Endpoint
    from serve.voting.prepare import StudyRequest, create_study
    from serve.voting.studies import study_links

    request = StudyRequest(
        name=name,
        adapters=_names(adapters),
        questions=questions,
        raters=_names(raters),
        votes_per_item=votes_per_item,
        title=title,
        base=base,
        axes=_names(axes),
        repeats=repeats,
        controls=controls,
        attention=attention,
        limit=limit,
        reveal=_reveal(reveal),
        seed=seed,
        temperature=temperature,
        max_tokens=max_tokens,
        concurrency=concurrency,
    )
    engine = open_service_database(database)
    endpoint = Endpoint(server, os.environ.get("FT_API_KEY", "").strip() or None)
    with console.status("Asking the models") as status:

        def progress(done: int, total: int) -> None:
            status.update(f"Asking the models: {done} of {total} answers")

        created = create_study(engine, Storage(storage), endpoint, request, progress)
    links = study_links(engine, name, server)
    study = created.study
    if as_json:
        shares = {"cut_answers": created.num_cut, "identical_answers": created.num_identical}
        print_json({"name": name, "assignments": len(study.assignments), **shares, "links": links})
        return
    real = sum(one.kind == "real" for one in study.comparisons)
    each = len(study.assignments) / len(study.raters)
    print_text(
        f"{name} is open: {counted(real, 'comparison')} of {', '.join(study.model_ids)}; {votes_per_item} votes for "
        f"each, about {each:.0f} for each of {counted(len(study.raters), 'rater')}.",
        indent=0,
    )
    if created.num_cut:
        print_text(f"{counted(created.num_cut, 'answer')} ended at --max-tokens, and are marked so.", indent=0)
    if created.num_identical:
        print_text(f"{counted(created.num_identical, 'comparison')} have two identical answers.", indent=0)
    _print_links(links)


@study_app.command("list")
def list_all(database: Database = None, as_json: AsJson = False) -> None:
    """List the studies."""
    from serve.voting.studies import study_summaries

    studies = study_summaries(open_service_database(database))
    if as_json:
        print_json([_as_json(study) for study in studies])
        return
    table = new_table("name", "state", "votes", "comparisons", "raters", "models", "created")
    for study in studies:
        table.add_row(
            study.name,
            "closed" if study.closed else "open",
            f"{study.done} of {study.assigned}",
            str(study.comparisons),
            str(len(study.raters)),
            ", ".join(str(model["id"]) for model in study.models),
            f"{study.created:%Y-%m-%d %H:%M}",
        )
    console.print(table)


@study_app.command("show")
def show(name: Name, database: Database = None, as_json: AsJson = False) -> None:
    """Show how far a study is, what it compares, and who has voted."""
    from serve.voting.studies import study_summary

    study = study_summary(open_service_database(database), name)
    if as_json:
        print_json(_as_json(study))
        return
    state = f"closed {study.closed:%Y-%m-%d %H:%M} UTC" if study.closed else "open"
    print_text(f"{name}: {state}, {study.done} of {study.assigned} votes", indent=0)
    for model in study.models:
        digest = model["adapter_digest"] or f"base {model['base_fingerprint']}"
        print_text(f"{model['id']} ({str(digest)[:21]})")
    print_text(f"questions: {study.settings['questions']} ({str(study.settings['questions_digest'])[:12]})")
    for votes, comparisons in study.reviews.items():
        print_text(f"{counted(comparisons, 'comparison')} with {counted(votes, 'vote')}")
    table = new_table("rater", "votes", "of")
    for rater in study.raters:
        table.add_row(rater.name or f"{rater.id} (deleted)", str(rater.done), str(rater.assigned))
    console.print(table)


@study_app.command("links")
def links(name: Name, server: Server = _SERVER, database: Database = None, as_json: AsJson = False) -> None:
    """Print each rater's link. Whoever has a link votes as that rater."""
    from serve.voting.studies import study_links

    found = study_links(open_service_database(database), name, server)
    if as_json:
        print_json(found)
    else:
        _print_links(found)


@study_app.command("judge")
def judge(
    name: Name,
    url: Annotated[str, typer.Option(metavar="URL", help="Any OpenAI-shaped endpoint, up to /v1.")],
    model: Annotated[str, typer.Option(help="The model that judges.")],
    key_env: Annotated[str | None, typer.Option(help="Environment variable with the key of that endpoint.")] = None,
    rubric: Annotated[str | None, typer.Option(help="What the judge is asked (default: that of suites).")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 8,
    storage: StorageRoot = DEFAULT_STORAGE,
    as_json: AsJson = False,
) -> None:
    """Ask a language model about the answers that people compare, and say how far it agrees with them.

    Questions and answers are sent to that endpoint. Results of the people stay as they are.
    """
    from ft_service.evaluate.ask import Endpoint
    from ft_service.evaluate.server import key_from_environment
    from ft_service.evaluate.suite import Judge
    from serve.voting.files import StudyFolder
    from serve.voting.judges import judge_lines, judge_study
    from serve.voting.stored import stored_votes

    settings = Judge(url=url, model=model, key_env=key_env, rubric=rubric or Judge.model_fields["rubric"].default)
    endpoint = Endpoint(url, key_from_environment(key_env) if key_env else None)
    folder = StudyFolder(Storage(storage), name)
    with console.status("Asking the judge") as status:

        def progress(done: int, total: int) -> None:
            status.update(f"Asking the judge: {done} of {total} verdicts")

        found = judge_study(folder, settings, endpoint, concurrency, progress)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    disagreed = sum(verdict.disagreed for verdict in found.verdicts)
    print_text(
        f"{model} judged {counted(len(found.verdicts), 'comparison')} in both orders; in {disagreed} the orders named "
        f"different answers, which counts as neither. {found.unread} could not be read.",
        indent=0,
    )
    for line in judge_lines(folder, stored_votes(folder)) or [
        "Nobody has voted yet, so there is no agreement to show."
    ]:
        print_text(line, indent=0)


@study_app.command("results")
def results(
    name: Name, storage: StorageRoot = DEFAULT_STORAGE, database: Database = None, as_json: AsJson = False
) -> None:
    """Say what the votes show, how far raters agree, and what is still missing."""
    from serve.voting.export import vote_records
    from serve.voting.files import StudyFolder
    from serve.voting.judges import judge_lines
    from serve.voting.results import axis_lines, median_seconds, rater_lines, result_lines, study_result
    from serve.voting.studies import study_summary

    engine = open_service_database(database)
    models = [str(model["id"]) for model in study_summary(engine, name).models]
    records = vote_records(engine, name)
    result = study_result(records, models)
    seconds = median_seconds(records)
    if as_json:
        print_json({**dataclasses.asdict(result), "median_seconds": seconds})
        return
    folder = StudyFolder(Storage(storage), name)
    for line in [*result_lines(result), *(judge_lines(folder, records) if folder.exists() else [])]:
        print_text(line, indent=0)
    for heading, lines in (("Scores", axis_lines(records, models)), ("Raters", rater_lines(result))):
        if lines:
            print_text(heading, indent=0)
        for line in lines:
            print_text(line)
    if seconds:
        print_text(f"Median seconds of a vote: {', '.join(f'{one} {value:g}' for one, value in seconds.items())}")


@study_app.command("export")
def export(
    name: Name,
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="Default: standard output.")] = None,
    to: Annotated[
        str, typer.Option(help="csv; jsonl; or preferences: prompt, chosen and rejected, for DPO.")
    ] = "jsonl",
    database: Database = None,
) -> None:
    """Write the votes, or the answers that raters prefer."""
    from serve.voting.export import as_csv, as_jsonl, as_preferences, vote_records
    from serve.voting.studies import study_summary

    if to not in ("csv", "jsonl", "preferences"):
        raise UsageError(f"--to = {to!r}: is csv, jsonl or preferences.")
    engine = open_service_database(database)
    axes = study_summary(engine, name).settings["axes"]
    records = vote_records(engine, name)
    text = as_csv(records, axes) if to == "csv" else as_jsonl(records) if to == "jsonl" else as_preferences(records)
    if file is None:
        print(text, end="")
        return
    try:
        file.write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise UsageError(f"FILE = {str(file)!r}: cannot be written ({error.strerror}).") from None
    rows = counted(len(records), "vote") if to != "preferences" else counted(text.count("\n"), "pair")
    console.print(f"{file}: {rows}", highlight=False)


@study_app.command("close")
def close(name: Name, storage: StorageRoot = DEFAULT_STORAGE, database: Database = None) -> None:
    """Take no more votes."""
    from serve.voting.studies import close_study

    close_study(open_service_database(database), Storage(storage), name)
    console.print(f"{name} is closed. Its votes are kept.", highlight=False)


@study_app.command("add-rater")
def add_rater(
    name: Name,
    rater: Annotated[str, typer.Argument(metavar="RATER")],
    server: Server = _SERVER,
    storage: StorageRoot = DEFAULT_STORAGE,
    database: Database = None,
) -> None:
    """Let somebody join for a rater who left: they get the comparisons with the fewest votes."""
    from serve.voting import studies

    engine = open_service_database(database)
    number = studies.add_rater(engine, Storage(storage), name, rater)
    console.print(f"{rater} gets {counted(number, 'comparison')}:", highlight=False)
    _print_links({rater: studies.study_links(engine, name, server)[rater]})


@study_app.command("delete-rater")
def delete_rater(
    name: Name,
    rater: Annotated[str, typer.Argument(metavar="RATER")],
    storage: StorageRoot = DEFAULT_STORAGE,
    database: Database = None,
    yes: Yes = False,
) -> None:
    """Delete a rater's name, votes and notes for good, in the database and on storage."""
    from serve.voting import studies

    engine = open_service_database(database)
    confirm_deletion(f"all votes of {rater} in {name}", yes)
    number = studies.delete_rater(engine, Storage(storage), name, rater)
    console.print(f"Deleted {rater} and {counted(number, 'vote')}. Their link is no longer valid.", highlight=False)


@study_app.command("rebuild")
def rebuild(name: Name, storage: StorageRoot = DEFAULT_STORAGE, database: Database = None) -> None:
    """Make a study's tables again from storage, where every vote is, too."""
    from serve.voting.studies import open_study

    number = open_study(open_service_database(database), Storage(storage), name, action="rebuild")
    console.print(f"{name}: {counted(number, 'vote')} from storage. Print the links again: they may have changed.")


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",")) if text.strip() else ()


def _reveal(text: str) -> Literal["vote", "end"]:
    if text == "vote":
        return "vote"
    if text == "end":
        return "end"
    raise UsageError(f"--reveal = {text!r}: is vote or end.")


def _as_json(study: "StudySummary") -> dict[str, object]:
    return {**dataclasses.asdict(study), "done": study.done, "assigned": study.assigned}


def _print_links(links: dict[str, str]) -> None:
    for rater, link in links.items():
        console.print(f"{rater}\t{link}", highlight=False, markup=False, soft_wrap=True)
    if any(link.startswith(("http://127.", "http://localhost")) for link in links.values()):
        print_text("Only this machine opens these links. For others: --server https://ADDRESS", indent=0)
