"""`ft plan`: the plan of a spec, the table of a model, what the GPUs of a server hold, or a simulation of loading."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ft_service.catalog.gpus import GPUS_PER_NODE, Gpu, find_gpu, known_gpus
from ft_service.cli.common import AsJson, Overrides, console, print_json
from ft_service.errors import SpecError, UsageError
from ft_service.model.light_imports import quick_imports
from ft_service.plan.facts import Resources
from ft_service.spec.load import InvalidSpecError, load_run_spec, settings_in
from ft_service.spec.schema import RunSpec

if TYPE_CHECKING:
    from ft_service.model.dry_run import DryRun

_TABLE_SEQ_LEN = 4096


@dataclass(frozen=True)
class Hardware:
    """The hardware options of `ft plan`. None: not given."""

    gpu: Gpu | None
    num_gpus: int | None
    num_nodes: int | None
    gpus_per_node: int | None
    gpu_memory_gib: float | None
    host_memory_gib: float | None
    price_per_gpu_hour: float | None

    def given(self) -> dict[str, object]:
        """The options that were given, with their values."""
        values = {
            "--gpu-type": self.gpu and self.gpu.name,
            "--gpus": self.num_gpus,
            "--nodes": self.num_nodes,
            "--gpus-per-node": self.gpus_per_node,
            "--gpu-memory-gib": self.gpu_memory_gib,
            "--host-memory-gib": self.host_memory_gib,
            "--price": self.price_per_gpu_hour,
        }
        return {option: value for option, value in values.items() if value is not None}

    def check_use(self, spec: RunSpec, dry_run: bool) -> None:
        """Raise `UsageError` if the plan of this spec does not depend on an option that was given."""
        if not spec.parallel.use_gpu:
            _reject(self.given(), "no effect with parallel.use_gpu: false. Leave out, or add parallel.use_gpu=true")
        if dry_run:
            _reject({"--price": self.price_per_gpu_hour}, "no effect with --dry-run. Leave out")

    def resources(self) -> Resources:
        """The resources that the plan of a spec is checked against."""
        gpus_per_node = self.gpus_per_node
        num_gpus = self.num_gpus
        if self.num_nodes is not None:
            gpus_per_node = gpus_per_node or GPUS_PER_NODE
            num_gpus = self.num_nodes * gpus_per_node
        return Resources(
            num_gpus=num_gpus,
            gpu_memory_gib=self.gpu_memory_gib or (self.gpu.memory_gib if self.gpu else None),
            gpu_type=self.gpu.name if self.gpu else None,
            gpus_per_node=gpus_per_node,
            num_nodes=self.num_nodes,
            host_memory_gib_per_node=self.host_memory_gib,
            price_per_gpu_hour=self.price_per_gpu_hour,
        )


def plan(
    spec_path: Annotated[Path | None, typer.Argument(metavar="SPEC", help="Run spec (YAML).")] = None,
    overrides: Overrides = None,
    table: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Instead of a SPEC: a hub id or folder, to plan on 1 to 64 GPUs."),
    ] = None,
    serve: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Instead of a SPEC: a model, or a server's config.yaml, to plan what its GPUs hold."
        ),
    ] = None,
    gpu_type: Annotated[str | None, typer.Option(help="GPU type by Ray's name, such as H100; sets its memory.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Number of nodes.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="GPUs per node (default 8).")] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="Number of GPUs, instead of --nodes.")] = None,
    gpu_memory_gib: Annotated[float | None, typer.Option(min=1, help="Memory of one GPU, in GiB.")] = None,
    host_memory_gib: Annotated[float | None, typer.Option(min=1, help="Main memory of one node, in GiB.")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="US dollars per GPU hour.")] = None,
    max_seq_len: Annotated[int | None, typer.Option(min=8, help="With --table: tokens per row (default 4096).")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Simulate loading on every rank: bytes read, held, and at the peak.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print the plan of a spec, its reasons, memory and time. Writes nothing; needs neither a GPU nor the weights."""
    if [spec_path, table, serve].count(None) != 2:
        raise UsageError("ft plan: needs either a SPEC, --table MODEL or --serve MODEL.")
    if nodes is not None and gpus is not None:
        raise UsageError(f"--nodes = {nodes}: conflicts with --gpus = {gpus}. Pass only one.")
    hardware = Hardware(_known_gpu(gpu_type), gpus, nodes, gpus_per_node, gpu_memory_gib, host_memory_gib, price)
    if serve is not None:
        _plan_serving(serve, hardware, {"--max-seq-len": max_seq_len, "--dry-run": dry_run or None}, as_json)
    elif table is not None and dry_run:
        _reject({**hardware.given(), "--max-seq-len": max_seq_len}, "no effect with --table and --dry-run. Leave out")
        _simulate_loading(table, as_json)
    elif table is not None:
        used = {"--gpu-type", "--gpus-per-node", "--price"}
        unused = {option: value for option, value in hardware.given().items() if option not in used}
        _reject(unused, "no effect with --table, which lists 1 to 64 GPUs. Leave out")
        _plan_table(table, hardware, max_seq_len or _TABLE_SEQ_LEN, as_json)
    elif max_seq_len is not None:
        raise UsageError(f"--max-seq-len = {max_seq_len}: only for --table. With a SPEC, use data.max_seq_len=...")
    elif spec_path is not None:
        _plan_spec(spec_path, overrides or [], hardware, dry_run, as_json)


def _plan_serving(target: str, hardware: Hardware, others: Mapping[str, object], as_json: bool) -> None:
    from ft_service.cli.plan_serving import show_serving_plan

    used = {"--gpu-type", "--gpu-memory-gib", "--gpus"}
    unused = {option: value for option, value in hardware.given().items() if option not in used}
    _reject({**unused, **others}, "no effect with --serve. Leave out")
    show_serving_plan(target, hardware.gpu, hardware.gpu_memory_gib, hardware.num_gpus, as_json)


def _reject(options: Mapping[str, object], why: str) -> None:
    """Raise `UsageError` if one of these options was given: nothing that a person writes is ignored in silence."""
    given = [f"{option} = {value}" for option, value in options.items() if value is not None]
    if given:
        raise UsageError(f"{', '.join(given)}: {why}.")


def _known_gpu(gpu_type: str | None) -> Gpu | None:
    gpu = find_gpu(gpu_type)
    if gpu_type is not None and gpu is None:
        raise UsageError(f"--gpu-type = {gpu_type!r}: unknown type. {known_gpus(gpu_type)} Or use --gpu-memory-gib.")
    return gpu


def _plan_spec(spec_path: Path, overrides: Sequence[str], hardware: Hardware, dry_run: bool, as_json: bool) -> None:
    spec = _load_for_plan(spec_path, overrides)
    hardware.check_use(spec, dry_run)
    from ft_service.cli.plan_view import show_plan

    with quick_imports():
        from ft_service.preflight import dry_run_of, plan_without_writing

    run_plan = plan_without_writing(spec, hardware.resources())
    if hardware.price_per_gpu_hour is not None and run_plan.estimate is None and run_plan.fits is not False:
        raise UsageError(f"--price = {hardware.price_per_gpu_hour:g}: needs the type of the GPU. Add --gpu-type.")
    if dry_run:
        _show_dry_runs(dry_run_of(run_plan), as_json)
    elif as_json:
        print(run_plan.model_dump_json(indent=2))
    else:
        show_plan(run_plan, console)


def _load_for_plan(spec_path: Path, overrides: Sequence[str]) -> RunSpec:
    """The spec. The problems of an invalid one include those with its sources and with a base in a folder."""
    try:
        return load_run_spec(spec_path, overrides)
    except InvalidSpecError as error:
        with quick_imports():
            from ft_service.data.problems import source_problems
            from ft_service.preflight import problems_with_base

        known = {problem.setting for problem in error.problems}
        found = [*source_problems(settings_in(spec_path, overrides)), *problems_with_base(error.valid)]
        more = [problem for problem in found if problem.setting not in known]
        raise SpecError([*error.problems, *more], error.where) from None


def _plan_table(model: str, hardware: Hardware, max_seq_len: int, as_json: bool) -> None:
    from ft_service.cli.plan_view import show_table
    from ft_service.plan.table import default_gpus, plan_table

    gpus = [hardware.gpu] if hardware.gpu else default_gpus()
    per_node = hardware.gpus_per_node or GPUS_PER_NODE
    plans = plan_table(model, gpus, max_seq_len, per_node, hardware.price_per_gpu_hour)
    if as_json:
        print(plans.model_dump_json(indent=2))
    else:
        show_table(plans, console)


def _simulate_loading(model: str, as_json: bool) -> None:
    from ft_service.preflight import dry_runs

    _show_dry_runs(dry_runs(model), as_json)


def _show_dry_runs(runs: "list[DryRun]", as_json: bool) -> None:
    from ft_service.cli.plan_view import show_dry_runs

    if as_json:
        print_json([dataclasses.asdict(run) for run in runs])
    else:
        show_dry_runs(runs, console)
