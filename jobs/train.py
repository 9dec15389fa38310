"""Train what a run spec asks for, and publish it.

ray job submit --working-dir . -- python jobs/train.py SPEC [--run-id ID] [setting=value ...]
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a job starts in the checkout, which is not installed

from ft_service.commands import exit_on_error
from ft_service.spec import load_run_spec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", help="run spec (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="setting=value", help="such as train.max_steps=10")
    parser.add_argument("--run-id", help="default: <name>-<8 hex>; a complete run of that id is not run again")
    arguments = parser.parse_intermixed_args()  # overrides may follow --run-id
    with exit_on_error():
        spec = load_run_spec(arguments.spec, arguments.overrides)
        from ft_service.train.launch import run  # torch and Ray take seconds: a bad spec is told before

        run(spec, arguments.run_id)


if __name__ == "__main__":
    main()
