"""Data to packed rows: ours against TRL's own preparation, on the same records and the same cores.

python benchmarks/data_throughput.py --data gsm8k/train.jsonl [--columns instruction=question,output=answer]
    [--records 50000] [--rounds 2] [--cores 2]
python benchmarks/data_throughput.py --smoke         on made-up records

All read one file of JSON lines and end with rows of 2,048 tokens of which only answers are trained on, on disk:

    ours    reads, tokenises, masks and packs, as TRL does
    gate    the same, and judges every record, as every run does
    trl     what `SFTTrainer` does when it is made

Each side runs in a process of its own, with an empty cache, in turn; measured is the preparation, not the start of
Python and Ray. The records are those of --data, each with a number before its question, as often as it takes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.result import add_smoke_option, print_result, shrink
from ft_service.cluster.ray_cluster import map_on_cluster
from ft_service.data import prepare
from ft_service.data.check import CheckResult
from ft_service.data.gate import Record
from ft_service.data.gate.gate import PartialResult
from ft_service.data.read import scan
from ft_service.data.tasks import TaskContext, check_shard, load_partial_result, pack
from ft_service.spec.load import parse_run_spec
from ft_service.spec.schema import RunSpec
from ft_service.storage.storage import Storage

ROW_TOKENS = 2048
GOAL = 2.0
GOAL_JUDGED = 1.0
GOAL_FILLED = 0.98
VOCAB_SIZE = 8000
SIDES = ("ours", "gate", "trl")

console = Console(highlight=False, stderr=True, soft_wrap=True)


def write_records(data: Path, columns: dict[str, str], count: int, out: Path) -> None:
    """Alpaca records, and the same as conversations for TRL."""
    records = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    with (out / "alpaca.jsonl").open("w") as alpaca, (out / "chat.jsonl").open("w") as chat:
        for number in range(count):
            record = records[number % len(records)]
            question = f"({number}) {record[columns['instruction']]}"
            answer = record[columns["output"]]
            alpaca.write(json.dumps({"instruction": question, "output": answer}) + "\n")
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            chat.write(json.dumps({"messages": turns}) + "\n")


@dataclass(frozen=True)
class UncheckedContext(TaskContext):
    """The context of preparing data, with a gate that only collects the keys of the records."""

    def gate(self, **_: Any) -> Any:
        return KeyCollector()


class KeyCollector:
    def __init__(self) -> None:
        self._keys: list[int] = []

    def check(self, record: Record) -> list[Any]:
        self._keys.append(record.key)
        return []

    def reason_left_out(self, _: Any) -> None:
        return None

    def partial_result(self) -> PartialResult:
        return PartialResult({0: len(self._keys)}, 0, np.array(self._keys, dtype=[("key", "u8")]))


def ours(world: Path, cores: int) -> dict[str, Any]:
    """The tasks of a run, without the checks of the gate, on a Ray of so many cores."""
    spec, tokenizer = started(world, cores)
    began = time.perf_counter()
    storage = Storage(spec.storage)
    inputs = prepare._Inputs(spec, [scan(0, spec.data.train[0])])
    context = UncheckedContext(**vars(inputs.context(storage, "datasets/unchecked", tokenizer)))
    for _ in map_on_cluster(check_shard, context, list(enumerate(inputs.shards))):
        pass
    with tempfile.TemporaryDirectory() as fetched:
        results = [load_partial_result(context, number, Path(fetched))[0] for number in range(len(inputs.shards))]
        keys = np.sort(np.concatenate([result.facts["key"] for result in results]))
    everything = CheckResult(None, keys, np.zeros(len(keys), dtype=bool))  # type: ignore[arg-type]
    packed = list(map_on_cluster(pack, context, list(prepare._groups(context, inputs.shards, everything))))
    took = time.perf_counter() - began
    tokens = sum(done.tokens[0] for done in packed)
    rows = sum(done.rows[0] for done in packed)
    return {"seconds": took, "tokens": tokens, "rows": rows, "records": len(keys)}


def gate(world: Path, cores: int) -> dict[str, Any]:
    """All that a run does, on a Ray of so many cores."""
    spec, tokenizer = started(world, cores)
    began = time.perf_counter()
    facts = prepare.prepare_dataset(spec, tokenizer, Storage(spec.storage), run_tasks=map_on_cluster).facts
    took = time.perf_counter() - began
    return {"seconds": took, "tokens": facts.tokens, "rows": facts.rows, "records": facts.conversations}


def started(world: Path, cores: int) -> tuple[RunSpec, Any]:
    """What is to be prepared, its tokenizer, and a Ray of so many cores."""
    import ray

    from ft_service.model.base import load_tokenizer

    data = {"path": str(world / "alpaca.jsonl"), "source": "benchmark", "license": "MIT"}
    document = {
        "name": "throughput",
        "model": {"base": str(world / "base")},
        "data": {"train": [data], "max_seq_len": ROW_TOKENS},
        "storage": str(world / "storage"),
    }
    ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False)
    return parse_run_spec(json.dumps(document)), load_tokenizer(world / "base")


def trl(world: Path, cores: int) -> dict[str, Any]:
    """Let `SFTTrainer` prepare, as it does when it is made; the model is as small as can be."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    from ft_service.chat.format import CHAT_TEMPLATE
    from ft_service.model.base import load_tokenizer

    tokenizer = load_tokenizer(world / "base")
    tokenizer.chat_template = CHAT_TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(world / "base")
    arguments = SFTConfig(
        output_dir=str(world / "out"),
        max_length=ROW_TOKENS,
        packing=True,
        assistant_only_loss=True,
        dataset_num_proc=cores,
        report_to="none",
        bf16=False,
        use_cpu=True,
    )
    began = time.perf_counter()
    records = load_dataset("json", data_files=str(world / "chat.jsonl"), split="train")
    trainer = SFTTrainer(model, arguments, train_dataset=records, processing_class=tokenizer)
    took = time.perf_counter() - began
    prepared: Any = trainer.train_dataset
    tokens = sum(len(row) for row in prepared["input_ids"])
    return {"seconds": took, "tokens": tokens, "rows": len(prepared), "records": len(records)}


def run_side(side: str, world: Path, cores: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="ft-throughput-") as cache:
        environment = {**os.environ, "HF_HOME": cache, "HF_DATASETS_CACHE": f"{cache}/datasets", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, "--side", side, "--world", str(world), "--cores", str(cores)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    subprocess.run(["rm", "-rf", str(world / "storage"), str(world / "out")], check=True)
    return result


def times_trl(results: list[dict[str, Any]], trl: list[dict[str, Any]]) -> float:
    return statistics.median(t["seconds"] / o["seconds"] for o, t in zip(results, trl, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--columns", default="instruction=question,output=answer")
    parser.add_argument("--records", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--world", type=Path, help=argparse.SUPPRESS)
    add_smoke_option(parser)
    arguments = parser.parse_args()
    shrink(arguments, records=500, rounds=1)
    if arguments.side:
        print(json.dumps({"ours": ours, "gate": gate, "trl": trl}[arguments.side](arguments.world, arguments.cores)))
        return 0
    if arguments.data is None and not arguments.smoke:
        parser.error("--data is needed: a file of JSON lines")
    from tests.worlds import TINY, write_base
    from tests.worlds import write_records as write_made_up_records

    columns = dict(pair.split("=", 1) for pair in arguments.columns.split(","))
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory(prefix="ft-throughput-") as temporary:
        world = Path(temporary)
        if arguments.smoke:
            arguments.data = world / "made-up.jsonl"
            columns = {"instruction": "instruction", "output": "output"}
            write_made_up_records(arguments.data, arguments.records)
        write_records(arguments.data, columns, arguments.records, world)
        texts = arguments.data.read_text(encoding="utf-8").splitlines()[:3000]
        write_base(world / "base", texts, VOCAB_SIZE, TINY)
        for number in range(arguments.rounds):
            for side in SIDES if number % 2 == 0 else reversed(SIDES):
                result = run_side(side, world, arguments.cores)
                found[side].append(result)
                console.print(
                    f"round {number + 1}, {side}: {result['seconds']:.1f} s for {result['records']:,} records"
                )
    table = Table("", "seconds", "records/s", "tokens/s", "rows", "filled", title=f"{arguments.records:,} records")
    figures: dict[str, Any] = {}
    for side, results in found.items():
        seconds = statistics.median(result["seconds"] for result in results)
        last = results[-1]
        filled = last["tokens"] / (last["rows"] * ROW_TOKENS)
        figures[side] = {
            "seconds": seconds,
            "records_per_second": last["records"] / seconds,
            "tokens_per_second": last["tokens"] / seconds,
            "rows": last["rows"],
            "filled": filled,
        }
        rates = (f"{last['records'] / seconds:,.0f}", f"{last['tokens'] / seconds:,.0f}")
        table.add_row(side, f"{seconds:.1f}", *rates, f"{last['rows']:,}", f"{filled:.1%}")
    Console(highlight=False, stderr=True, width=None if sys.stderr.isatty() else 100).print(table)
    times = {side: times_trl(found[side], found["trl"]) for side in ("ours", "gate")}
    console.print(f"{times['ours']:.1f} times TRL; with the data gate {times['gate']:.1f}")
    holds = times["ours"] >= GOAL and times["gate"] >= GOAL_JUDGED and figures["ours"]["filled"] >= GOAL_FILLED
    goal = {"times_trl": GOAL, "times_trl_judged": GOAL_JUDGED, "filled": GOAL_FILLED}
    print_result(arguments, "data_throughput", figures={**figures, "times_trl": times}, goal=goal, holds=holds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
