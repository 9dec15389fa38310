"""`ft`: each command parses, calls one function of the package, prints, and exits 0 (done), 1 (failed) or 2 (usage)."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ft_service.catalog.gpus import GPUS, GPUS_PER_NODE, find_gpu
from ft_service.cli.data import data_app
from ft_service.errors import UsageError, exit_on_error
from ft_service.registry.registry import AdapterRecord, Registry
from ft_service.spec.load import load_run_spec
from ft_service.storage.storage import Storage

if TYPE_CHECKING:
    from ft_service.model.dry_run import DryRun

app = typer.Typer(
    help="Fine-tune Llama 3 on a Ray cluster, from a run spec to an adapter that answers over HTTP.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
adapters_app = typer.Typer(help="Published adapters and models.", invoke_without_command=True)
app.add_typer(adapters_app, name="adapters")
app.add_typer(data_app, name="data")
console = Console()

SpecPath = Annotated[Path, typer.Argument(metavar="SPEC", help="Run spec (YAML).")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[setting=value]...", help="Such as train.max_steps=10.")
]
RunId = Annotated[str | None, typer.Option("--run-id", help="Default: <name>-<8 hex>.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
StorageRoot = Annotated[
    str, typer.Option("--storage", envvar="FT_STORAGE", help="Storage root: a folder, or an s3:// or gs:// URI.")
]
DEFAULT_STORAGE = "storage"


def main() -> None:
    """Entry point of the `ft` command."""
    with exit_on_error():
        app()


# -- runs ------------------------------------------------------------------------------------------------------------


@app.command()
def plan(
    spec_path: Annotated[Path | None, typer.Argument(metavar="SPEC", help="Run spec (YAML).")] = None,
    overrides: Overrides = None,
    table: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Instead of a spec: every method on 1 to 64 GPUs, for a hub id or folder."),
    ] = None,
    gpu_type: Annotated[str | None, typer.Option(help="Ray's name of the GPU, such as H100; tells its memory.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes there are.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="GPUs in each (default 8).")] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs there are, instead of nodes.")] = None,
    gpu_memory_gib: Annotated[float | None, typer.Option(min=1, help="Memory of one GPU, in GiB.")] = None,
    host_memory_gib: Annotated[float | None, typer.Option(min=1, help="Main memory of one node, in GiB.")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="US dollars per GPU and hour.")] = None,
    max_seq_len: Annotated[
        int | None, typer.Option(min=8, help="With --table: length of a row (default 4096).")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Walk the loading of the base on every rank: bytes read, held, at peak.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print what a spec resolves to, why, and what it takes; writes nothing, needs neither a GPU nor the weights."""
    if (spec_path is None) == (table is None):
        raise UsageError("ft plan: takes a SPEC, or --table MODEL. Name one of the two.")
    gpu = None
    if gpu_type is not None and (gpu := find_gpu(gpu_type)) is None:
        raise UsageError(f"--gpu-type = {gpu_type!r}: not known. Use one of {', '.join(GPUS)}, or --gpu-memory-gib.")
    if nodes is not None and gpus is not None:
        raise UsageError(f"--nodes = {nodes}: stands beside --gpus = {gpus}. Keep one of the two.")
    from ft_service.cli import plan_view

    if table is not None and dry_run:
        from ft_service.preflight import dry_runs

        _print_dry_runs(dry_runs(table), as_json)
        return
    if table is not None:
        from ft_service.plan.table import default_gpus, plan_table

        per_node = gpus_per_node or GPUS_PER_NODE
        found = plan_table(table, [gpu] if gpu else default_gpus(), max_seq_len or 4096, per_node, price)
        if as_json:
            print(found.model_dump_json(indent=2))
        else:
            plan_view.show_table(found, console)
        return
    assert spec_path is not None
    if max_seq_len is not None:
        raise UsageError(f"--max-seq-len = {max_seq_len}: goes with --table. With a SPEC write data.max_seq_len=...")
    spec = load_run_spec(spec_path, overrides or [])
    from ft_service.plan.facts import Resources
    from ft_service.preflight import plan_without_writing

    if nodes is not None:
        gpus_per_node = gpus_per_node or GPUS_PER_NODE
        gpus = nodes * gpus_per_node
    decided = plan_without_writing(
        spec,
        Resources(
            num_gpus=gpus,
            gpu_memory_gib=gpu_memory_gib or (gpu.memory_gib if gpu else None),
            gpu_type=gpu.name if gpu else None,
            gpus_per_node=gpus_per_node,
            num_nodes=nodes,
            host_memory_gib_per_node=host_memory_gib,
            price_per_gpu_hour=price,
        ),
    )
    if dry_run:
        from ft_service.preflight import dry_run_of

        _print_dry_runs(dry_run_of(decided), as_json)
    elif as_json:
        print(decided.model_dump_json(indent=2))
    else:
        plan_view.show_plan(decided, console)


def _print_dry_runs(found: "list[DryRun]", as_json: bool) -> None:
    from ft_service.cli import plan_view

    if as_json:
        print(json.dumps([dataclasses.asdict(run) for run in found], indent=2))
    else:
        plan_view.show_dry_runs(found, console)


@app.command()
def train(spec_path: SpecPath, overrides: Overrides = None, run_id: RunId = None) -> None:
    """Train and publish here: joins the Ray cluster of RAY_ADDRESS, or starts one on this machine."""
    spec = load_run_spec(spec_path, overrides or [])
    from ft_service.launch import run

    run(spec, run_id)


@app.command()
def submit(
    spec_path: SpecPath,
    overrides: Overrides = None,
    address: Annotated[str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="Dashboard of the cluster's head.")] = (
        "http://127.0.0.1:8265"
    ),
    run_id: RunId = None,
    detach: Annotated[bool, typer.Option(help="Print the submission id and return.")] = False,
) -> None:
    """Submit jobs/train.py through the Ray Jobs API, follow its log, and exit with its result."""
    spec = load_run_spec(spec_path, overrides or [])
    from ft_service.cluster.submit import submit_run

    raise SystemExit(submit_run(spec_path, spec, overrides or [], address, run_id, detach))


@app.command()
def runs(storage: StorageRoot = DEFAULT_STORAGE, as_json: AsJson = False) -> None:
    """List the runs on a storage root."""
    from ft_service.runs.events import read_events
    from ft_service.runs.folder import RunFolder
    from ft_service.runs.history import attempts, wasted_steps

    root = Storage(storage)
    found = [RunFolder(root, run_id).status() for run_id in root.folders("runs")]
    lived = {status.run_id: attempts(read_events(root, status.run_id)) for status in found if status is not None}
    statuses = [status for status in found if status is not None]
    if as_json:
        _print_json(
            [
                {
                    **status.model_dump(mode="json"),
                    "attempts": len(lived[status.run_id]),
                    "wasted_steps": wasted_steps(lived[status.run_id]),
                }
                for status in statuses
            ]
        )
        return
    table = _table("run", "state", "since", "attempts", "wasted steps", "published", "message")
    for status in statuses:
        table.add_row(
            status.run_id,
            status.state,
            f"{status.time:%Y-%m-%d %H:%M}",
            str(len(lived[status.run_id])),
            str(wasted_steps(lived[status.run_id])),
            status.published or "",
            status.message[:80],
        )
    console.print(table)


@app.command()
def show(run_id: str, storage: StorageRoot = DEFAULT_STORAGE, as_json: AsJson = False) -> None:
    """Show one run: state, plan, attempts, and its last measurements."""
    from ft_service.runs.events import read_events
    from ft_service.runs.folder import find_run
    from ft_service.runs.history import attempts, wasted_steps
    from ft_service.runs.metrics import read_metrics

    run = find_run(Storage(storage), run_id)
    status, metrics = run.status(), read_metrics(run.storage, run_id)
    lived = attempts(read_events(run.storage, run_id))
    last = metrics[-1] if metrics else None
    if as_json:
        _print_json(
            {
                "status": status.model_dump(mode="json") if status else None,
                "attempts": [attempt.model_dump(mode="json") for attempt in lived],
                "wasted_steps": wasted_steps(lived),
                "last_step": last.model_dump(mode="json") if last else None,
                "folder": run.storage.uri(run.path),
            }
        )
        return
    if status:
        console.print(f"[bold]{run_id}[/bold] {status.state} {status.message}", highlight=False)
    if run.storage.exists(f"{run.path}/plan.json"):
        for sentence in run.plan().summary:
            console.print(f"  {sentence}", highlight=False)
    if last:
        console.print(f"  At step {last.step}: loss {last.loss:.4f}, {last.tokens_per_second:,.0f} tokens/s")
    if lived:
        table = _table("attempt", "began", "from step", "workers", "on", "steps repeated", "ended")
        for number, attempt in enumerate(lived, start=1):
            began = "" if attempt.time is None else f"{attempt.time:%Y-%m-%d %H:%M:%S}"
            counts = (str(attempt.step), str(attempt.workers), ", ".join(attempt.hosts), str(attempt.repeated))
            table.add_row(str(number), began, *counts, attempt.ended)
        console.print(table)
    console.print(f"  {run.storage.uri(run.path)}", soft_wrap=True)


@app.command()
def stop(
    run_id: str,
    storage: StorageRoot = DEFAULT_STORAGE,
    now: Annotated[bool, typer.Option("--now", help="Do not wait for the step and a checkpoint.")] = False,
    wait: Annotated[bool, typer.Option(help="Wait until it has stopped.")] = True,
) -> None:
    """Stop a run: the step is finished, a checkpoint saved, nothing published. `ft resume` goes on."""
    from ft_service.runs.folder import stop_run

    stop_run(Storage(storage), run_id, now, wait, log=lambda text: console.print(text, highlight=False))


@app.command()
def resume(
    run_id: str,
    overrides: Overrides = None,
    storage: StorageRoot = DEFAULT_STORAGE,
    address: Annotated[
        str | None, typer.Option(help="Dashboard of a cluster's head: go on there, as `ft submit` would.")
    ] = None,
    detach: Annotated[bool, typer.Option(help="With --address: print the submission id and return.")] = False,
) -> None:
    """Go on with a run that was stopped or failed, by the spec that it began with: here, or on a cluster."""
    from ft_service.runs.folder import resumed_spec

    spec = resumed_spec(run_id, storage, overrides or [])
    if address is not None:
        from ft_service.cluster.submit import submit_resume

        raise SystemExit(submit_resume(run_id, storage, overrides or [], address, detach))
    from ft_service.launch import run

    run(spec, run_id)


# -- adapters --------------------------------------------------------------------------------------------------------


@adapters_app.callback()
def adapters(context: typer.Context, storage: StorageRoot = DEFAULT_STORAGE, as_json: AsJson = False) -> None:
    """List what was published: adapters, and models of `full` runs."""
    if context.invoked_subcommand is not None:
        return
    registry = Registry(Storage(storage))
    records = [*registry.records("model"), *registry.records("adapter")]
    if as_json:
        _print_json([record.model_dump(mode="json") for record in records])
        return
    table = _table("id", "kind", "base", "steps", "loss", "validation loss", "created")
    for record in records:
        validation = "" if record.validation_loss is None else f"{record.validation_loss:.4f}"
        created = f"{record.created:%Y-%m-%d %H:%M}"
        base = record.base.short_name
        table.add_row(record.id, record.kind, base, str(record.steps), f"{record.final_loss:.4f}", validation, created)
    console.print(table)


@adapters_app.command()
def verify(adapter_id: str, storage: StorageRoot = DEFAULT_STORAGE, as_json: AsJson = False) -> None:
    """Check one: digests, module names and shapes against the base, and that its answers differ from the base's."""
    from ft_service.evaluate.verify import verify_adapter

    registry = Registry(Storage(storage))
    findings = verify_adapter(registry, registry.resolve(adapter_id))
    if as_json:
        _print_json([finding.__dict__ for finding in findings])
    else:
        for finding in findings:
            mark = "[green]ok[/green]    " if finding.passed else "[red]failed[/red]"
            console.print(f"{mark} {finding.name}: {finding.detail}", highlight=False)
    if not all(finding.passed for finding in findings):
        raise SystemExit(1)


@adapters_app.command()
def merge(adapter_id: str, out: Path, storage: StorageRoot = DEFAULT_STORAGE) -> None:
    """Fold an adapter into its base in bf16, and write the model to the new folder OUT."""
    from ft_service.model.merge import merge_adapter

    registry = Registry(Storage(storage))
    record: AdapterRecord = registry.resolve(adapter_id)
    merge_adapter(registry, record, out)
    console.print(f"Merged {record.id} into {out}")


# -- serving and help ------------------------------------------------------------------------------------------------


@app.command()
def serve(
    storage: StorageRoot = DEFAULT_STORAGE,
    base: Annotated[str | None, typer.Option(help="Hub id or folder; default: the one base of all adapters.")] = None,
    host: Annotated[str, typer.Option(help="Beyond loopback, FT_API_KEY must be set.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
) -> None:
    """Serve a base and every adapter published for it, in OpenAI's HTTP shapes."""
    from serve.run import run_server

    run_server(storage, base, host, port)


@app.command()
def doctor(storage: StorageRoot = DEFAULT_STORAGE, as_json: AsJson = False) -> None:
    """Tell what this machine has: versions, accelerators, DeepSpeed ops, Ray, storage."""
    from ft_service.cluster.doctor import run_checks

    checks = run_checks(storage)
    if as_json:
        _print_json([check.__dict__ for check in checks])
    else:
        table = _table("check", "", "result")
        for check in checks:
            mark = {"ok": "[green]ok[/green]", "warn": "[yellow]warn[/yellow]", "fail": "[red]fail[/red]"}[check.level]
            table.add_row(check.name, mark, check.detail)
        console.print(table)
    if any(check.level == "fail" for check in checks):
        raise SystemExit(1)


def _table(*columns: str) -> Table:
    """A table whose first column, what people copy, is never cut or folded."""
    table = Table(*columns, box=None)
    table.columns[0].no_wrap = True
    return table


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
