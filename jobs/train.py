"""Train and publish a run spec, or resume a run that was stopped or failed.

ray job submit --working-dir . -- python jobs/train.py SPEC [--run-id ID] [setting=value ...]
ray job submit --working-dir . -- python jobs/train.py --resume ID --storage ROOT [setting=value ...]

On `ray job stop` (SIGTERM) it finishes the step, saves a checkpoint, and exits with code 3.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a job runs in the checkout, which is not installed

from ft_service.cluster.detach import detach
from ft_service.errors import UsageError, exit_on_error

_PACKAGES = (
    *("ray", "torch", "transformers", "peft", "deepspeed", "bitsandbytes", "datasets", "pydantic", "pyarrow"),
    "obstore",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", nargs="?", help="run spec (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="setting=value", help="override settings: train.max_steps=10")
    parser.add_argument("--run-id", help="default: <name>-<8 hex>; a completed run does not run again")
    parser.add_argument("--resume", metavar="ID", help="resume this run with the spec that it started with")
    parser.add_argument("--storage", metavar="ROOT", help="with --resume: storage root of the run")
    arguments = parser.parse_intermixed_args()  # overrides may follow --run-id
    overrides = list(arguments.overrides)
    with exit_on_error():
        if arguments.resume:
            if arguments.spec is not None:
                overrides.insert(0, arguments.spec)
            if arguments.storage is None or arguments.run_id:
                raise UsageError(
                    f"--resume = {arguments.resume!r}: requires --storage ROOT, and conflicts with --run-id."
                )
            from ft_service.runs.folder import resumed_spec

            spec = resumed_spec(arguments.resume, arguments.storage, overrides)
        elif arguments.spec is None:
            raise UsageError("jobs/train.py: needs either a SPEC or --resume ID --storage ROOT.")
        else:
            from ft_service.spec.load import load_run_spec

            spec = load_run_spec(arguments.spec, overrides)
        from ft_service.model.light_imports import quick_imports

        with quick_imports():
            from ft_service.launch import run  # after the checks: importing torch and Ray takes seconds

        run(spec, arguments.resume or arguments.run_id)


def check_packages() -> None:
    """Exit with the name of this Python if it lacks packages: a job runs the first `python` of its cluster's PATH."""
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        sys.exit(
            f"jobs/train.py: {sys.executable} runs this driver, and lacks {', '.join(missing)}. A job uses the python "
            "that its cluster finds first: activate the virtual environment before `ray start`, or submit with its "
            "full path, as in: ray job submit --working-dir . -- /path/to/.venv/bin/python jobs/train.py SPEC"
        )


if __name__ == "__main__":
    check_packages()
    with detach():
        main()
