"""What all benchmarks share: the option --smoke, and the line of JSON that each prints last."""

import argparse
import json
from typing import Any


def add_smoke_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--smoke", action="store_true", help="the smallest size, in seconds: only to see that it works")


def shrink(arguments: argparse.Namespace, **smallest: Any) -> None:
    """With --smoke, set the options to their smallest useful values."""
    if arguments.smoke:
        vars(arguments).update(smallest)


def print_result(arguments: argparse.Namespace, benchmark: str, *, goal: Any, holds: bool | None, **more: Any) -> None:
    """Print the result as one line of JSON. A smoke run measures nothing, so it has neither a goal nor a verdict."""
    verdict = {"goal": None, "holds": None} if arguments.smoke else {"goal": goal, "holds": holds}
    print(json.dumps({"benchmark": benchmark, "smoke": arguments.smoke, **more, **verdict}))
