"""Evaluate an adapter by a suite, as a Ray job.

ray job submit --working-dir . -- python jobs/evaluate.py ADAPTER --suite SUITE --storage ROOT [--server URL] [...]

It takes the arguments of `ft evaluate`. The key of the server is FT_API_KEY. Without --server it starts one on the
cluster for the evaluation. A job that was stopped continues where it was. Exit code 1: some questions have no answer.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a job runs in the checkout, which is not installed

from ft_service.errors import UsageError, exit_on_error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="id of a published adapter")
    parser.add_argument("--suite", required=True, help="a YAML file, or general-en or general-ja")
    parser.add_argument("--storage", default=os.environ.get("FT_STORAGE"), help="storage root (default: FT_STORAGE)")
    parser.add_argument("--against", help="another adapter or model (default: the adapter's base)")
    parser.add_argument("--server", help="address of a server, up to /v1 (default: one is started)")
    parser.add_argument("--base", help="without --server: where the base is now, if it has moved")
    parser.add_argument("--concurrency", type=int, default=8, help="questions asked at once")
    parser.add_argument("--limit", type=int, help="items of each skill: a quick look")
    parser.add_argument("--id", help="id of the evaluation (default: follows from suite and weights)")
    arguments = parser.parse_args()
    with exit_on_error():
        if not arguments.storage:
            raise UsageError("--storage: names no root, and FT_STORAGE is not set. Pass the storage of your runs.")
        for name in ("concurrency", "limit"):
            value = getattr(arguments, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name} = {value}: must be at least 1.")
        from ft_service.cli.evaluate_view import ProgressLine, show_evaluation
        from ft_service.evaluate.launch import evaluate_on
        from ft_service.evaluate.run import Request
        from ft_service.storage.storage import Storage

        request = Request(
            adapter=arguments.adapter,
            suite=arguments.suite,
            storage=arguments.storage,
            against=arguments.against,
            evaluation_id=arguments.id,
            concurrency=arguments.concurrency,
            limit=arguments.limit,
        )
        key = os.environ.get("FT_API_KEY", "").strip() or None
        evaluation = evaluate_on(request, arguments.server, key, arguments.base, ProgressLine())
        show_evaluation(evaluation, Storage(arguments.storage).uri(f"evaluations/{evaluation.id}"))
    if not evaluation.is_complete:
        sys.exit(1)


if __name__ == "__main__":
    main()
