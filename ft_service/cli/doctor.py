"""`ft doctor`: checks of this machine."""

import dataclasses

from ft_service.cli.common import DEFAULT_STORAGE, AsJson, StorageRoot, console, new_table, print_json

_MARKS = {"ok": "[green]ok[/green]", "warn": "[yellow]warning[/yellow]", "fail": "[red]failed[/red]"}


def doctor(storage: StorageRoot = DEFAULT_STORAGE, as_json: AsJson = False) -> None:
    """Check this machine: package versions, accelerators, DeepSpeed ops, Ray, and the storage."""
    from ft_service.cluster.doctor import run_checks

    checks = run_checks(storage)
    if as_json:
        print_json([dataclasses.asdict(check) for check in checks])
    else:
        table = new_table("check", "", "result")
        for check in checks:
            table.add_row(check.name, _MARKS[check.level], check.detail)
        console.print(table)
    if any(check.level == "fail" for check in checks):
        raise SystemExit(1)
