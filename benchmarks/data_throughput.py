"""Data to packed rows: ours against TRL's own preparation, on the same records and the same cores.

python benchmarks/data_throughput.py --data gsm8k/train.jsonl [--columns instruction=question,output=answer]
    [--records 30000] [--rounds 2] [--cores 2]

Both read one file of JSON lines and end with rows of 2,048 tokens of which only answers are trained on, on disk. Ours
also judges every record (the data gate), which TRL does not. Each side runs in a
process of its own, with an empty cache, in turn; measured is the preparation, not the start of Python and Ray.
The records are those of --data, each with a number before its question, as often as it takes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

ROW_TOKENS = 2048
GOAL = 2.0
GOAL_FILLED = 0.98
VOCAB_SIZE = 8000
SIDES = ("ours", "trl")

console = Console(highlight=False, stderr=True, soft_wrap=True)


def write_records(data: Path, columns: dict[str, str], count: int, out: Path) -> None:
    """Alpaca records, and the same as conversations for TRL."""
    records = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    with (out / "alpaca.jsonl").open("w") as alpaca, (out / "chat.jsonl").open("w") as chat:
        for number in range(count):
            record = records[number % len(records)]
            question, answer = f"({number}) {record[columns['instruction']]}", record[columns["output"]]
            alpaca.write(json.dumps({"instruction": question, "output": answer}) + "\n")
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            chat.write(json.dumps({"messages": turns}) + "\n")


def ours(world: Path, cores: int) -> dict[str, Any]:
    """Prepare with our own tasks on a Ray of so many cores."""
    import ray

    from ft_service.cluster import spread
    from ft_service.data.prepare import prepare_dataset
    from ft_service.model.base import load_tokenizer
    from ft_service.spec import parse_run_spec
    from ft_service.storage import Storage

    spec = parse_run_spec(
        json.dumps(
            {
                "name": "throughput",
                "model": {"base": str(world / "base")},
                "data": {
                    "train": [{"path": str(world / "alpaca.jsonl"), "source": "benchmark", "license": "MIT"}],
                    "max_seq_len": ROW_TOKENS,
                },
                "storage": str(world / "storage"),
            }
        )
    )
    tokenizer = load_tokenizer(world / "base")
    ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False)
    began = time.perf_counter()
    dataset = prepare_dataset(spec, tokenizer, Storage(spec.storage), run=spread)
    took = time.perf_counter() - began
    facts = dataset.facts
    return {"seconds": took, "tokens": facts.tokens, "rows": facts.rows, "records": facts.conversations}


def trl(world: Path, cores: int) -> dict[str, Any]:
    """Let `SFTTrainer` prepare, as it does when it is made; the model is as small as can be."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    from ft_service.chat import CHAT_TEMPLATE
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--columns", default="instruction=question,output=answer")
    parser.add_argument("--records", type=int, default=30_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--world", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps({"ours": ours, "trl": trl}[arguments.side](arguments.world, arguments.cores)))
        return 0
    if arguments.data is None:
        parser.error("--data is needed: a file of JSON lines")
    from ft_service.model.scratch import train_tokenizer, write_scratch_model

    columns = dict(pair.split("=", 1) for pair in arguments.columns.split(","))
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory(prefix="ft-throughput-") as temporary:
        world = Path(temporary)
        write_records(arguments.data, columns, arguments.records, world)
        texts = arguments.data.read_text(encoding="utf-8").splitlines()[:3000]
        sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 16}
        write_scratch_model(world / "base", tokenizer=train_tokenizer(texts, VOCAB_SIZE), seed=0, **sizes)
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
    times = statistics.median(t["seconds"] / o["seconds"] for o, t in zip(found["ours"], found["trl"], strict=True))
    console.print(f"{times:.1f} times TRL")
    holds = times >= GOAL and figures["ours"]["filled"] >= GOAL_FILLED
    goal = {"times_trl": GOAL, "filled": GOAL_FILLED}
    print(
        json.dumps(
            {"benchmark": "data_throughput", "figures": {**figures, "times_trl": times}, "goal": goal, "holds": holds}
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
