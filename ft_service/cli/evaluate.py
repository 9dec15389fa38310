"""`ft evaluate`: judges an adapter by a suite, against its base or another adapter."""

from typing import Annotated

import typer

from ft_service.cli.common import DEFAULT_STORAGE, AsJson, StorageRoot, print_json


def evaluate(
    adapter: Annotated[str, typer.Argument(help="Id of a published adapter, as the server names it.")],
    suite: Annotated[str, typer.Option(help="A suite: a YAML file, or a shipped one (general-en, general-ja).")],
    storage: StorageRoot = DEFAULT_STORAGE,
    against: Annotated[str | None, typer.Option(help="Another adapter or model (default: the adapter's base).")] = None,
    server: Annotated[
        str | None, typer.Option(help="Address of a server, up to /v1 (default: one is started for the evaluation).")
    ] = None,
    key: Annotated[str | None, typer.Option(envvar="FT_API_KEY", help="Key of that server.")] = None,
    base: Annotated[
        str | None, typer.Option(metavar="PATH", help="Without --server: where the base is now, if it has moved.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=512, help="Questions asked at once.")] = 8,
    limit: Annotated[int | None, typer.Option(min=1, help="Items of each skill: a quick look.")] = None,
    evaluation_id: Annotated[
        str | None, typer.Option("--id", help="Id of the evaluation (default: follows from suite and weights).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate an adapter by a suite, against its base or another adapter.

    Asks both over /v1 and compares their answers item by item. An evaluation that was interrupted goes on where it
    was. Exit code 1: some questions have no answer.
    """
    from ft_service.cli.evaluate_view import ProgressLine, show_evaluation
    from ft_service.evaluate.launch import evaluate_on
    from ft_service.evaluate.run import Request
    from ft_service.storage.storage import Storage

    request = Request(adapter, suite, storage, against, evaluation_id, concurrency, limit)
    evaluation = evaluate_on(request, server, key, base, ProgressLine())
    if as_json:
        print_json(evaluation.model_dump(mode="json"))
    else:
        show_evaluation(evaluation, Storage(storage).uri(f"evaluations/{evaluation.id}"))
    if not evaluation.is_complete:
        raise SystemExit(1)
