"""`ft doctor`: checks of this machine, or of all nodes of a cluster."""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Protocol

import typer

from ft_service.cli.common import DEFAULT_STORAGE, AsJson, StorageRoot, console, new_table, print_json
from ft_service.text import counted

if TYPE_CHECKING:
    from ft_service.cluster.doctor_nodes import NodeCheck

_MARKS = {"ok": "[green]ok[/green]", "warn": "[yellow]warning[/yellow]", "fail": "[red]broken[/red]"}


def doctor(
    storage: StorageRoot = DEFAULT_STORAGE,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Check all nodes of the cluster at RAY_ADDRESS, and between them.")
    ] = False,
    nodes: Annotated[int, typer.Option(min=1, help="With --cluster: wait until so many nodes have joined.")] = 1,
    speed: Annotated[
        bool, typer.Option("--speed", help="Also measure the storage, with a file of 64 MiB; --cluster always does.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check versions, GPUs, DeepSpeed ops, limits, Ray and the storage; exit code 1 if something is broken."""
    if cluster:
        from ft_service.cluster.doctor_nodes import check_cluster

        found = check_cluster(storage, nodes)
        if as_json:
            print_json([dataclasses.asdict(check) for check in found])
        else:
            _print(_merged(found), "node")
        failed = any(check.level == "fail" for check in found)
    else:
        from ft_service.cluster.doctor import run_checks

        checks = run_checks(storage, speed)
        if as_json:
            print_json([dataclasses.asdict(check) for check in checks])
        else:
            _print([("", check) for check in checks])
        failed = any(check.level == "fail" for check in checks)
    if failed:
        raise SystemExit(1)


class _Line(Protocol):
    """A check of one machine or of nodes."""

    @property
    def name(self) -> str: ...
    @property
    def level(self) -> str: ...
    @property
    def detail(self) -> str: ...
    @property
    def cure(self) -> str: ...


def _print(rows: Iterable[tuple[str, _Line]], where: str = "") -> None:
    table = new_table("check", *([where] if where else []), "", "result")
    table.columns[-1].overflow = "fold"  # a version or path stays whole
    for nodes, check in rows:
        result = f"{check.detail}\n[dim]->[/dim] {check.cure}" if check.cure else check.detail
        table.add_row(check.name, *([nodes] if where else []), _MARKS[check.level], result)
    console.print(table)


def _merged(found: "list[NodeCheck]") -> list[tuple[str, _Line]]:
    """One line for the nodes that have the same result, in the order of the checks."""
    num_nodes = len({check.node for check in found} - {"cluster"})
    nodes: dict[tuple[str, str, str, str], list[str]] = {}
    first: dict[tuple[str, str, str, str], NodeCheck] = {}
    for check in found:
        key = (check.name, check.level, check.detail, check.cure)
        nodes.setdefault(key, []).append(check.node)
        first.setdefault(key, check)
    order = {name: place for place, name in enumerate(dict.fromkeys(check.name for check in found))}
    keys = sorted(nodes, key=lambda key: order[key[0]])
    return [
        (f"all {counted(num_nodes, 'node')}" if len(nodes[key]) == num_nodes > 1 else "\n".join(nodes[key]), first[key])
        for key in keys
    ]
