"""`ft compare`: two adapters on the items that both were evaluated on."""

from typing import Annotated

import typer

from ft_service.cli.common import DEFAULT_STORAGE, AsJson, StorageRoot, console, print_item, print_json, print_text
from ft_service.errors import UsageError


def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="Id of a published adapter that was evaluated.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another one; it is judged against the first.")],
    suite: Annotated[str | None, typer.Option(help="Only by this suite (default: by every suite of both).")] = None,
    storage: StorageRoot = DEFAULT_STORAGE,
    as_json: AsJson = False,
) -> None:
    """Compare two adapters on the same items of stored evaluations: nothing is asked again.

    To ask both afresh: ft evaluate B --against A --suite SUITE.
    """
    from ft_service.cli.evaluate_view import comparison_table
    from ft_service.evaluate.stored import compare_stored
    from ft_service.registry.registry import Registry
    from ft_service.storage.storage import Storage

    if first == second:
        raise UsageError(f"B = {second!r}: is the same adapter as A. Name another one.")
    root = Storage(storage)
    registry = Registry(root)
    found = compare_stored(root, registry.resolve(first), registry.resolve(second), suite)
    if as_json:
        print_json(
            [
                {
                    "suite": one.suite,
                    "first": one.first,
                    "second": one.second,
                    "sentence": one.sentence,
                    "remarks": list(one.remarks),
                    **one.comparison.model_dump(mode="json"),
                }
                for one in found
            ]
        )
        return
    for number, one in enumerate(found):
        if number:
            console.print()
        print_item(f"B {one.second} against A {one.first}", f"suite {one.suite}")
        console.print()
        if one.rows:
            console.print(comparison_table(one.rows, "A", "B"))
            console.print()
        for line in (one.sentence, *one.remarks):
            print_text(line)
