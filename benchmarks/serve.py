"""Serving: our engine and gateway against stock `generate`, a server that switches adapters, vLLM, transformers serve.

python benchmarks/serve.py [--rounds 3] [--clients 16] [--dtype float32] [--threads 2] [--vllm-python PYTHON] [--smoke]
python benchmarks/serve.py --soak 10

A 23 M-parameter Llama with random weights and LoRA adapters of rank 8 and 16 on all linear layers. Every client asks
its next request when its last one is answered; all prompts have one length, and so have all answers, so that the static
batches of `generate` lose nothing. Each side is a process of its own. All are up at once and take turns, a round each,
while the others are stopped; a ratio is the median over rounds of figures that were measured one after the other.

Beside throughput there are CPU-seconds. On a machine that does other work at the same time they are the better figure.
"""

import argparse
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.result import add_smoke_option, print_result, shrink
from benchmarks.serving import soak
from benchmarks.serving.server import our_server, transformers_server
from benchmarks.serving.work import Round, World, to_line
from benchmarks.serving.world import SIZES, SMALLEST, write_world

ADAPTERS = {"base": 0, "one": 1, "four": 4, "thirty-two": 32, "generate": 0, "switching": 4, "vllm": 4}
"""Of each side, the adapters that its requests are for."""
GOALS = {
    "base / generate": 1.0,
    "four / one": 0.85,
    "four / base": 0.7,
    "four / vllm": 1.5,
    "four / switching": 4.0,
    "thirty-two / four": 0.7,
    "gateway / direct": 0.85,
}
GOAL_ADDED_FIRST_MS = 10.0
GOAL_LOAD_MS = 100.0
START_SECONDS = 600
ROUND_SECONDS = 1800

Measure = Callable[[Round], dict[str, Any]]
Figures = dict[str, list[dict[str, Any]]]


class Side:
    """A process that answers rounds. Between them it is stopped: some libraries poll while they wait."""

    def __init__(self, name: str, command: Sequence[str], folder: Path, threads: int) -> None:
        self._name = name
        self._log = folder / f"{name}.log"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
        }
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with self._log.open("w") as log:
            # A session of its own, so that vLLM's processes end with it.
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stderr=log, start_new_session=True, **pipes
            )
        self._read("READY", START_SECONDS)
        os.killpg(self.process.pid, signal.SIGSTOP)

    def measure(self, work: Round) -> dict[str, Any]:
        assert self.process.stdin
        os.killpg(self.process.pid, signal.SIGCONT)
        self.process.stdin.write(to_line(work))
        self.process.stdin.flush()
        result: dict[str, Any] = json.loads(self._read("RESULT", ROUND_SECONDS).removeprefix("RESULT "))
        os.killpg(self.process.pid, signal.SIGSTOP)
        return result

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _read(self, start: str, seconds: float) -> str:
        assert self.process.stdout
        deadline = time.monotonic() + seconds
        while select.select([self.process.stdout], [], [], max(deadline - time.monotonic(), 0))[0]:
            line = self.process.stdout.readline()
            if line.startswith(start):
                return line
            if not line:
                break
        self.close()
        raise RuntimeError(f"{self._name} failed:\n{self._log.read_text()[-4000:]}")


def start_side(
    name: str, folder: Path, arguments: argparse.Namespace, stack: ExitStack, core: int | None = None
) -> Side:
    threads = 1 if core is not None else arguments.threads
    options = ["--world", str(folder), "--batch", str(arguments.clients), "--threads", str(threads)]
    if name == "vllm":
        command = [arguments.vllm_python, str(ROOT / "benchmarks/serving/vllm_side.py"), *options]
    else:
        command = [sys.executable, "-m", "benchmarks.serving.sides", name, *options]
    if core is not None:
        command += ["--core", str(core)]
    side = Side(name, command, folder, threads)
    stack.callback(side.close)
    return side


# -- parts of the benchmark --------------------------------------------------------------------------------------------


def compare_engines(world: World, folder: Path, arguments: argparse.Namespace) -> tuple[Figures, dict[str, str]]:
    """Rounds of all sides without our gateway, and why a side is missing."""
    missing: dict[str, str] = {}
    adapters = {name: min(number, arguments.adapters) for name, number in ADAPTERS.items()}
    with ExitStack() as stack:
        measures: dict[str, Measure] = {}
        for name in adapters:
            if name in arguments.skip:
                missing[name] = "skipped"
            elif name == "vllm" and not arguments.vllm_python:
                missing[name] = "no --vllm-python"
            else:
                try:
                    measures[name] = start_side(name, folder, arguments, stack).measure
                except (RuntimeError, OSError) as error:
                    missing[name] = str(error)[-1500:]
        if "transformers-serve" in arguments.skip:
            missing["transformers-serve"] = "skipped"
        else:
            try:
                server = stack.enter_context(transformers_server(world, folder, arguments.threads))
                measures["transformers-serve"] = server.measure
            except (RuntimeError, OSError) as error:
                missing["transformers-serve"] = str(error)[-1500:]
        figures = take_turns(measures, world, arguments, {**adapters, "transformers-serve": 0}, missing)
    return figures, missing


def compare_gateway(world: World, folder: Path, arguments: argparse.Namespace) -> Figures:
    """The same engine in a process, and behind Serve's proxy and our gateway; the engine has a core to itself."""
    cores = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        server = stack.enter_context(our_server(world, folder, arguments.clients))
        direct = start_side("direct", folder, arguments, stack, cores[0])
        if len(cores) > 1:
            server.hold_engine_to_core(cores[0], cores[1])
            os.sched_setaffinity(0, {cores[1]})
            stack.callback(os.sched_setaffinity, 0, set(cores))
        measures: dict[str, Measure] = {"direct": direct.measure, "gateway": server.measure}
        figures = take_turns(measures, world, arguments, {})
        alone = argparse.Namespace(**{**vars(arguments), "clients": 1, "requests": arguments.alone})
        for name, runs in take_turns(measures, world, alone, {}, label=" (one client)").items():
            figures[f"{name}-alone"] = runs
    return figures


def measure_load(folder: Path, world: World, arguments: argparse.Namespace) -> list[float]:
    with ExitStack() as stack:
        side = start_side("load", folder, arguments, stack)
        work = round_of(0, world, arguments, arguments.adapters)
        side.measure(Round(**{**vars(work), "requests": 2}))
        added: list[float] = side.measure(Round(**{**vars(work), "number": 1, "requests": arguments.loads}))["added"]
    return added


def take_turns(
    measures: dict[str, Measure],
    world: World,
    arguments: argparse.Namespace,
    adapters: dict[str, int],
    missing: dict[str, str] | None = None,
    label: str = "",
) -> Figures:
    """Round 0 warms up, and loads the adapters. A side that fails then is left out, if others may be missing."""
    figures: Figures = {name: [] for name in measures}
    for number in range(arguments.rounds + 1):
        for name, measure in measures.items():
            if name not in figures:
                continue
            work = round_of(number, world, arguments, adapters.get(name, 0))
            try:
                measured = measure(work)
            except Exception as error:
                if missing is None:
                    raise
                missing[name] = f"{type(error).__name__}: {error}"[-1500:]
                del figures[name]
                continue
            if number:
                figures[name].append(measured)
                print(
                    f"round {number}: {name + label:20} {measured['tokens_per_second']:9,.0f} tok/s "
                    f"{measured['cpu_ms_per_token']:8.3f} CPU-ms/tok",
                    flush=True,
                )
    return figures


def round_of(number: int, world: World, arguments: argparse.Namespace, adapters: int) -> Round:
    """Round 0 is short, but asks for every adapter."""
    return Round(
        number=number,
        requests=arguments.requests if number else max(min(arguments.clients, arguments.requests), adapters),
        clients=arguments.clients,
        prompt_tokens=arguments.prompt_tokens,
        answer_tokens=arguments.answer_tokens if number else min(8, arguments.answer_tokens),
        vocab_size=world.vocab_size,
        adapters=adapters,
    )


# -- figures -----------------------------------------------------------------------------------------------------------


def summary(runs: list[dict[str, Any]]) -> dict[str, float | None]:
    """Medians over rounds; percentiles over the requests of all rounds, in ms."""
    first = [1000 * value for run in runs for value in run["first"]]
    per_token = [1000 * value for run in runs for value in run["per_token"]]
    medians = {
        key: statistics.median(run[key] for run in runs)
        for key in runs[0]
        if key == "tokens_per_second" or key.endswith("cpu_ms_per_token")
    }
    return {
        **medians,
        "first_p50_ms": percentile(first, 50),
        "first_p99_ms": percentile(first, 99),
        "per_token_p50_ms": percentile(per_token, 50),
    }


def percentile(values: list[float], percent: int) -> float | None:
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def ratios_of(figures: Figures) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """Of throughput, and of tokens per CPU-second: medians over rounds."""
    throughput: dict[str, float | None] = {}
    cpu: dict[str, float | None] = {}
    for name in GOALS:
        ours, other = name.split(" / ")
        pairs = list(zip(figures.get(ours, []), figures.get(other, []), strict=False))
        throughput[name] = cpu[name] = None
        if pairs:
            throughput[name] = statistics.median(a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs)
            cpu[name] = statistics.median(engine_cpu(b) / engine_cpu(a) for a, b in pairs)
    return throughput, cpu


def engine_cpu(run: dict[str, Any]) -> float:
    """CPU-milliseconds a token; of a server those of the engine's process, which has a core to itself."""
    return float(run.get("engine_process_cpu_ms_per_token") or run["cpu_ms_per_token"])


def print_table(table: dict[str, dict[str, float | None]]) -> None:
    columns = ("tokens_per_second", "cpu_ms_per_token", "first_p50_ms", "first_p99_ms", "per_token_p50_ms")
    print(f"\n{'side':20} {'tok/s':>9} {'CPU-ms/tok':>11} {'first p50':>10} {'first p99':>10} {'ms/token':>9}")
    for side, values in table.items():
        cells = ["-" if values[column] is None else f"{values[column]:,.2f}" for column in columns]
        print(f"{side:20} {cells[0]:>9} {cells[1]:>11} {cells[2]:>10} {cells[3]:>10} {cells[4]:>9}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=16, help="requests in flight, and the batch limit of all sides")
    parser.add_argument("--requests", type=int, default=64, help="of a round")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--alone", type=int, default=20, help="requests of a round with one client")
    parser.add_argument("--loads", type=int, default=64, help="adapters that are loaded")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--vllm-python", help="an interpreter that can import vllm")
    parser.add_argument("--skip", nargs="*", default=[], help="sides, or the parts engines, gateway and load")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="instead: full load while replicas die")
    add_smoke_option(parser)
    arguments = parser.parse_args()
    shrink(
        arguments,
        rounds=1,
        clients=2,
        requests=4,
        prompt_tokens=8,
        answer_tokens=4,
        adapters=4,
        alone=2,
        loads=2,
        threads=1,
        skip=[*arguments.skip, "transformers-serve"],  # a comparison only, and the slowest to start
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sizes = SMALLEST if arguments.smoke else SIZES
        world = write_world(folder, sizes, arguments.adapters, arguments.dtype)
        if arguments.soak:
            figures = soak.soak(world, folder, arguments)
            print_result(arguments, "serve", figures=figures, goal=soak.GOAL, holds=soak.holds(figures))
            return
        found: Figures = {}
        missing: dict[str, str] = {}
        added: list[float] = []
        if "engines" not in arguments.skip:
            found, missing = compare_engines(world, folder, arguments)
        if "gateway" not in arguments.skip:
            found |= compare_gateway(world, folder, arguments)
        if "load" not in arguments.skip:
            added = [1000 * seconds for seconds in measure_load(folder, world, arguments)]
    show(arguments, found, missing, added)


def show(arguments: argparse.Namespace, found: Figures, missing: dict[str, str], added: list[float]) -> None:
    table = {side: summary(runs) for side, runs in found.items()}
    print_table(table)
    for side, reason in missing.items():
        print(f"{side}: missing, {reason}")
    throughput, cpu = ratios_of(found)
    first: dict[str, float | None] = {"loaded": None, "alone": None}
    for kind, suffix in (("loaded", ""), ("alone", "-alone")):
        through = table.get(f"gateway{suffix}", {}).get("first_p50_ms")
        direct = table.get(f"direct{suffix}", {}).get("first_p50_ms")
        if through is not None and direct is not None:
            first[kind] = through - direct
    load = {"p50_ms": percentile(added, 50), "p99_ms": percentile(added, 99)}
    holds = {name: ratio is not None and ratio >= GOALS[name] for name, ratio in throughput.items()}
    holds["gateway adds to the first token"] = first["alone"] is not None and first["alone"] <= GOAL_ADDED_FIRST_MS
    holds["load"] = load["p99_ms"] is not None and load["p99_ms"] <= GOAL_LOAD_MS
    print(f"\n{'ratio':20} {'throughput':>11} {'per CPU-s':>10} {'goal':>6}")
    for name, goal in GOALS.items():
        cells = ["-" if value is None else f"{value:.2f}" for value in (throughput[name], cpu[name])]
        print(f"{name:20} {cells[0]:>11} {cells[1]:>10} {goal:>6} {'holds' if holds[name] else 'missed'}")
    print(f"the gateway adds to the first token, ms (goal {GOAL_ADDED_FIRST_MS:g}): {first}")
    print(f"an unloaded adapter adds to the first token, ms (goal {GOAL_LOAD_MS:g}): {load}")
    print_result(
        arguments,
        "serve",
        dtype=arguments.dtype,
        clients=arguments.clients,
        threads=arguments.threads,
        figures=table,
        missing=missing,
        ratios=throughput,
        cpu_ratios=cpu,
        added_first_ms=first,
        load=load,
        goal={**GOALS, "added_first_ms": GOAL_ADDED_FIRST_MS, "load_ms": GOAL_LOAD_MS},
        goals_held=holds,
        holds=all(holds.values()),
    )


if __name__ == "__main__":
    main()
