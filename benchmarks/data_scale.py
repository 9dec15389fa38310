"""A million records through the data gate: time, and the most memory of any process.

python benchmarks/data_scale.py [--records 1000000] [--kinds mixed,templated] [--cores 2] [--smoke]

Synthetic records of 40 to 300 characters, three in a hundred of them exact copies and as many near-copies. `templated`
is the hard case for finding near-duplicates: all questions are of one template and differ in a few words. CheckResult,
tokenised and packed as Ray tasks, then once more, which finds the result of the first time.

    memory   of each process, twice a second: what is its own (USS), without pages that others share
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.result import add_smoke_option, print_result, shrink

GOAL_GIB = 2.0
ROW_TOKENS = 2048
VOCAB_SIZE = 4000
COPIES = 0.03
_SAMPLE_SECONDS = 0.5

console = Console(highlight=False, stderr=True, soft_wrap=True)


def records(kind: str, count: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """Questions and answers of made-up words; some records come again, whole or with one word changed."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnoprstuvwy", k=rng.randint(2, 9))) for _ in range(20_000)]
    kept: list[dict[str, str]] = []
    for number in range(count):
        chance = rng.random()
        if kept and chance < COPIES:
            yield rng.choice(kept)
            continue
        if kept and chance < 2 * COPIES:
            old = rng.choice(kept)
            parts = old["output"].split()
            parts[rng.randrange(len(parts))] = rng.choice(words)
            yield {**old, "output": " ".join(parts)}
            continue
        output = " ".join(rng.choices(words, k=rng.randint(8, 40))).capitalize() + "."
        if kind == "templated":
            question = f"Please write a short and friendly reply to the customer {' '.join(rng.choices(words, k=2))}."
        else:
            question = " ".join(rng.choices(words, k=rng.randint(5, 20))).capitalize() + "?"
        record = {"instruction": question, "output": output}
        if number % 100 == 0:
            kept.append(record)
        yield record


class Watch(threading.Thread):
    """The most own memory, in GiB, of any process below this one, by what it is."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peaks: dict[str, float] = {}
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(_SAMPLE_SECONDS):
            root = psutil.Process()
            for process in (root, *root.children(recursive=True)):
                try:
                    name = "driver" if process == root else process.cmdline()[0].split()[0].split("/")[-1]
                    own = process.memory_full_info().uss / 2**30
                except (psutil.Error, IndexError):
                    continue
                self.peaks[name] = max(own, self.peaks.get(name, 0.0))

    def end(self) -> None:
        self._ended.set()
        self.join()


def prepare(world: Path, kind: str, cores: int) -> dict[str, Any]:
    """In a process of its own: twice over the same data."""
    import ray

    from ft_service.cluster.ray_cluster import map_on_cluster
    from ft_service.data.prepare import prepare_dataset
    from ft_service.model.base import load_tokenizer
    from ft_service.spec.load import parse_run_spec
    from ft_service.storage.storage import Storage

    source = {"path": str(world / f"{kind}.jsonl"), "source": "benchmark", "license": "CC0-1.0"}
    document = {
        "name": "scale",
        "model": {"base": str(world / "base")},
        "data": {"train": [source], "validation": {"fraction": 0.01}, "max_seq_len": ROW_TOKENS},
        "storage": str(world / "storage"),
    }
    spec = parse_run_spec(json.dumps(document))
    tokenizer = load_tokenizer(world / "base")
    ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False)
    watch = Watch()
    watch.start()
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        dataset = prepare_dataset(spec, tokenizer, Storage(spec.storage), console.print, map_on_cluster)
        seconds.append(time.perf_counter() - began)
    watch.end()
    facts = dataset.facts
    judgement = dataset.judgement
    return {
        "records": judgement.read,
        "seconds": seconds[0],
        "again_seconds": seconds[1],
        "peak_gib": watch.peaks,
        "filled": facts.tokens / (facts.rows * ROW_TOKENS),
        "findings": {finding.code: finding.count for finding in judgement.findings},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--kinds", default="mixed,templated")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--world", type=Path, help=argparse.SUPPRESS)
    add_smoke_option(parser)
    arguments = parser.parse_args()
    shrink(arguments, records=2000, kinds="mixed")
    if arguments.world:
        print(json.dumps(prepare(arguments.world, arguments.kinds, arguments.cores)))
        return 0
    from tests.worlds import TINY, write_base

    figures = {}
    with tempfile.TemporaryDirectory(prefix="ft-scale-") as temporary:
        world = Path(temporary)
        texts = [record["output"] for record in records("mixed", 3000)]
        write_base(world / "base", texts, VOCAB_SIZE, TINY)
        for kind in arguments.kinds.split(","):
            with (world / f"{kind}.jsonl").open("w") as file:
                file.writelines(json.dumps(record) + "\n" for record in records(kind, arguments.records))
            command = [
                sys.executable,
                __file__,
                "--world",
                str(world),
                "--kinds",
                kind,
                "--cores",
                str(arguments.cores),
            ]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            figures[kind] = json.loads(done.stdout.splitlines()[-1])
    table = Table("", "seconds", "records/s", "again, s", "driver GiB", "largest other GiB", "filled")
    for kind, found in figures.items():
        others = max((gib for name, gib in found["peak_gib"].items() if name != "driver"), default=0.0)
        table.add_row(
            kind,
            f"{found['seconds']:.0f}",
            f"{found['records'] / found['seconds']:,.0f}",
            f"{found['again_seconds']:.1f}",
            f"{found['peak_gib']['driver']:.2f}",
            f"{others:.2f}",
            f"{found['filled']:.1%}",
        )
    Console(highlight=False, stderr=True, width=None if sys.stderr.isatty() else 100).print(table)
    holds = all(gib <= GOAL_GIB for found in figures.values() for gib in found["peak_gib"].values())
    print_result(arguments, "data_scale", figures=figures, goal={"gib": GOAL_GIB}, holds=holds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
