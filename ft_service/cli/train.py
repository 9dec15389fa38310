"""`ft train`, `ft submit`, `ft stop` and `ft resume`: starting, stopping and resuming runs."""

from typing import Annotated

import typer

from ft_service.cli.common import DEFAULT_STORAGE, Overrides, RunId, SpecPath, StorageRoot, console
from ft_service.errors import UsageError
from ft_service.model.light_imports import quick_imports
from ft_service.spec.load import load_run_spec
from ft_service.storage.storage import Storage


def train(spec_path: SpecPath, overrides: Overrides = None, run_id: RunId = None) -> None:
    """Train and publish. Joins the Ray cluster at RAY_ADDRESS, or starts one on this machine."""
    spec = load_run_spec(spec_path, overrides or [])
    with quick_imports():
        from ft_service.launch import run

    run(spec, run_id)


def submit(
    spec_path: SpecPath,
    overrides: Overrides = None,
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="Address of the cluster's dashboard.")
    ] = "http://127.0.0.1:8265",
    run_id: RunId = None,
    detach: Annotated[bool, typer.Option(help="Print the submission id and return.")] = False,
) -> None:
    """Submit jobs/train.py through the Ray Jobs API, follow its log, and exit with its exit code."""
    spec = load_run_spec(spec_path, overrides or [])
    from ft_service.cluster.submit import submit_run

    raise SystemExit(submit_run(spec_path, spec, overrides or [], address, run_id, detach))


def stop(
    run_id: str,
    storage: StorageRoot = DEFAULT_STORAGE,
    now: Annotated[bool, typer.Option("--now", help="Stop without finishing the step or saving a checkpoint.")] = False,
    wait: Annotated[bool, typer.Option(help="Wait until the run has stopped.")] = True,
) -> None:
    """Stop a run: finish the current step, save a checkpoint, publish nothing. `ft resume` continues it."""
    from ft_service.runs.folder import stop_run

    stop_run(Storage(storage), run_id, now, wait, log=lambda text: console.print(text, highlight=False))


def resume(
    run_id: str,
    overrides: Overrides = None,
    storage: StorageRoot = DEFAULT_STORAGE,
    address: Annotated[
        str | None, typer.Option(help="Address of a cluster's dashboard: resume there, as a submitted job.")
    ] = None,
    detach: Annotated[bool, typer.Option(help="With --address: print the submission id and return.")] = False,
) -> None:
    """Resume a stopped or failed run with the spec that it started with.

    It can be given more steps, or fewer: train.max_steps=400. Settings of where it runs (parallel.*) may change too.
    It runs here, or on a cluster.
    """
    from ft_service.runs.folder import resumed_spec

    if detach and address is None:
        raise UsageError("--detach: no effect without --address. Add it, or leave --detach out.")
    spec = resumed_spec(run_id, storage, overrides or [])
    if address is not None:
        from ft_service.cluster.submit import submit_resume
        from ft_service.runs.folder import RunFolder
        from ft_service.train.continuation import check_settings

        check_settings(spec, RunFolder(Storage(storage), run_id))

        raise SystemExit(submit_resume(run_id, storage, overrides or [], address, detach))
    with quick_imports():
        from ft_service.launch import run

    run(spec, run_id)
