"""The whole path on two CPU cores, offline: records, base model, adapter, server, what it learned, its page.

python examples/quickstart/quickstart.py [--folder quickstart]

It stops everything it starts. The results stay in the folder.
"""

import argparse
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout need not be installed

from examples.quickstart.records import standard_library, write_records
from ft_service.errors import ClusterError, FtError, ServingError, TrainingError
from ft_service.registry.registry import AdapterRecord, Registry
from ft_service.runs.folder import RunFolder, new_run_id
from ft_service.storage.storage import Storage

PROJECT = Path(__file__).resolve().parents[2]
NUM_CPUS = 2
OBJECT_STORE_BYTES = 200 * 1024 * 1024
VOCAB_SIZE = 2048
MODEL_SIZES = {"hidden_size": 192, "num_layers": 4, "num_heads": 3, "num_kv_heads": 1, "intermediate_size": 512}
ANSWER_TOKENS = 8
PARALLEL_REQUESTS = 8
EXPECTED_GAIN_POINTS = 60
JUDGED_QUESTIONS = 60
JUDGED_TEXTS = 20
JUDGED_CHARACTERS = 600
JUDGED_TWICE = 6
EXAMPLES_SHOWN = 6
EXAMPLE_CHARACTERS = 60

RAY_START_SECONDS = 120
SERVE_START_SECONDS = 180
ANSWER_SECONDS = 120
STOP_SECONDS = 20

Record = dict[str, str]
console = Console(highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("quickstart"), help="for everything it writes")
    folder = parser.parse_args().folder.absolute()
    os.environ["DS_ACCELERATOR"] = "cpu"  # otherwise DeepSpeed looks for a GPU and warns that there is none
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run_quickstart(folder)
    except FtError as error:
        console.print(f"[red]Failed.[/red] {error}", soft_wrap=True)
    except KeyboardInterrupt:
        console.print("Interrupted. Everything it started has been stopped.")
    return 1


def run_quickstart(folder: Path) -> int:
    """All steps, in order; returns the exit code."""
    began = time.monotonic()
    records = folder / "records"
    storage = Storage(str(folder / "storage"))
    registry = Registry(storage)
    with step(1, "Records from the documentation of the installed standard library"):
        for name, count in write_records(records, standard_library()).items():
            console.print(f"  {records / name}: {count:,} records", soft_wrap=True)
    with step(2, "A tokenizer, and a Llama with random weights"):
        write_scratch(folder / "scratch", records / "docs.jsonl")
    with ray_head(folder / "ray.log") as ray:
        with step(4, "Base model: a full run over the documentation"):
            base_run, base = train(ray, storage, "base", records / "docs.jsonl", folder / "scratch")
        with step(5, "Adapter: LoRA on that base, 2 DeepSpeed workers"):
            adapter_run, adapter = train(ray, storage, "adapter", records / "train.jsonl", registry.folder(base))
        questions = [json.loads(line) for line in (records / "heldout.jsonl").read_text("utf-8").splitlines()]
        title = f"{len(questions)} held-out questions, to base and adapter"
        with server(ray, storage, registry.folder(base), folder / "serve.log") as url:
            with step(7, title):
                gain = compare(questions, *(ask_all(url, model.id, questions) for model in (base, adapter)))
            with step(8, "The page of the adapter"):
                page = judge(url, storage, adapter, records, folder)
    console.print(f"\nDone in {time.monotonic() - began:.0f} s; Ray and the server have stopped.\n")
    print_next_steps(records, registry, base, adapter, [base_run, adapter_run], page)
    if gain < EXPECTED_GAIN_POINTS:
        console.print(f"[red]Failed.[/red] The adapter gained {gain:.0f} points; expected are {EXPECTED_GAIN_POINTS}.")
        return 1
    return 0


@contextmanager
def step(number: int, title: str) -> Iterator[None]:
    console.print(f"\n[bold]{number}/8 {title}[/bold]")
    began = time.monotonic()
    yield
    console.print(f"  [dim]took {time.monotonic() - began:.0f} s[/dim]")


# -- model -----------------------------------------------------------------------------------------------------------


def write_scratch(folder: Path, docs: Path) -> None:
    from ft_service.model.scratch import train_tokenizer, write_scratch_model  # torch takes seconds: step 1 shows first

    texts = [json.loads(line)["text"] for line in docs.read_text("utf-8").splitlines()]
    tokenizer = train_tokenizer(texts, VOCAB_SIZE)
    write_scratch_model(folder, tokenizer=tokenizer, seed=0, **MODEL_SIZES)
    size_mib = (folder / "model.safetensors").stat().st_size / 2**20
    console.print(f"  {folder}: {len(tokenizer):,} tokens, {size_mib:.0f} MiB of weights", soft_wrap=True)


# -- Ray and training ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ray:
    """A Ray head: its dashboard, and the environment in which commands know its address and token."""

    dashboard: str
    environment: dict[str, str]


@contextmanager
def ray_head(log: Path, num_cpus: int = NUM_CPUS) -> Iterator[Ray]:
    """A Ray head with its own ports, folder and token, independent of any other Ray on this machine."""
    # Ray creates its sockets below this folder, and Linux limits their paths to 107 bytes.
    session = Path(tempfile.mkdtemp(prefix="ft-", dir="/tmp"))
    gcs, dashboard, client = free_ports(3)
    ray = Ray(f"http://127.0.0.1:{dashboard}", ray_environment(f"127.0.0.1:{gcs}"))
    command = ["ray", "start", "--head", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1"]
    command += [f"--port={gcs}", f"--ray-client-server-port={client}", "--dashboard-agent-listen-port=0"]
    command += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    command += ["--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={session}"]
    command += [f"--num-cpus={num_cpus}", "--num-gpus=0", f"--object-store-memory={OBJECT_STORE_BYTES}"]
    try:
        with background(command, ray.environment, log) as head:
            with step(3, "A local Ray"):
                headers = {"Authorization": f"Bearer {ray.environment['RAY_AUTH_TOKEN']}"}
                if not answers_in_time(f"{ray.dashboard}/api/version", head, RAY_START_SECONDS, headers):
                    raise ClusterError(f"Ray did not start; its log is {log}.")
                console.print(f"  dashboard {ray.dashboard}, token {ray.environment['RAY_AUTH_TOKEN']}", soft_wrap=True)
            yield ray
    finally:
        shutil.rmtree(session, ignore_errors=True)


def ray_environment(address: str) -> dict[str, str]:
    """This process's environment without settings of another Ray. Jobs run the `python` that runs this script."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "FT_"))}
    return environment | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")]),
        "RAY_ADDRESS": address,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "HF_HUB_OFFLINE": "1",
    }


def train(ray: Ray, storage: Storage, spec: str, data: Path, base: Path) -> tuple[RunFolder, AdapterRecord]:
    """Submit a run, show its log, and return it with what it published."""
    run = RunFolder(storage, new_run_id(spec))
    command = ["ray", "job", "submit", "--address", ray.dashboard, "--working-dir", ".", "--"]
    command += ["python", "jobs/train.py", f"examples/quickstart/{spec}.yaml"]
    command += [f"storage={storage.root}", f"model.base={base}", f"data.train.0.path={data}", "--run-id", run.run_id]
    console.print(f"  [dim]{' '.join(command)}[/dim]", soft_wrap=True)
    with stopped_at_exit(subprocess.Popen(command, cwd=PROJECT, env=ray.environment, start_new_session=True)) as job:
        job.wait()
    status = run.status()
    if job.returncode != 0 or status is None or status.published is None:
        raise TrainingError(f"run {run.run_id} published nothing (exit code {job.returncode}); its log is above.")
    return run, Registry(storage).resolve(status.published)


# -- serving and asking ----------------------------------------------------------------------------------------------


@contextmanager
def server(ray: Ray, storage: Storage, base: Path, log: Path) -> Iterator[str]:
    """Serve the base and its adapters; yields the address."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}/v1"
    command = [sys.executable, "-m", "ft_service.cli.app", "serve", "--storage", storage.root, "--base", str(base)]
    command += ["--port", str(port)]
    with background(command, ray.environment, log) as process:
        with step(6, "Ray Serve"):
            if not answers_in_time(f"{url}/health", process, SERVE_START_SECONDS):
                raise ServingError(f"the server did not start; its log is {log}.")
            console.print(f"  {url}, its log is {log}", soft_wrap=True)
        yield url


def ask_all(url: str, model: str, questions: list[Record]) -> list[str]:
    """The model's answer to each question, greedy."""
    with httpx.Client(timeout=ANSWER_SECONDS, trust_env=False) as client, ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:

        def ask(question: Record) -> str:
            message = {"role": "user", "content": f"{question['instruction']}\n\n{question['input']}"}
            body = {"model": model, "messages": [message], "temperature": 0, "max_tokens": ANSWER_TOKENS}
            response = client.post(f"{url}/chat/completions", json=body)
            if response.is_error:
                raise ServingError(f"{model}: HTTP {response.status_code}, {response.text}")
            return str(response.json()["choices"][0]["message"]["content"]).strip()

        try:
            return list(track(pool.map(ask, questions), f"  {model}", len(questions), console=console))
        except httpx.HTTPError as error:
            raise ServingError(f"{model}: no answer from {url} ({type(error).__name__}: {error}).") from None


def compare(questions: list[Record], base_answers: list[str], adapter_answers: list[str]) -> float:
    """Print both against the expected answers; returns the adapter's gain in percentage points."""
    expected = [question["output"] for question in questions]
    examples = Table("question about", "expected", "base says", "adapter says", title="A few of the questions")
    for question, *answers in list(zip(questions, base_answers, adapter_answers, strict=True))[:EXAMPLES_SHOWN]:
        examples.add_row(
            textwrap.shorten(question["input"], EXAMPLE_CHARACTERS, placeholder="..."),
            question["output"],
            *map(repr, answers),
        )
    [(most_frequent, _)] = Counter(expected).most_common(1)
    scores = Table("who answers", "exact answer", "right first word", title=f"{len(expected)} held-out questions")
    right = {}
    for name, answers in {
        "always the most frequent answer": [most_frequent] * len(expected),
        "base": base_answers,
        "adapter": adapter_answers,
    }.items():
        right[name] = percent_right(expected, answers)
        first_words = [answer.partition(" ")[0] for answer in answers]
        scores.add_row(name, f"{right[name]:.1f} %", f"{percent_right(expected, first_words):.1f} %")
    console.print("", examples, "", scores)
    return right["adapter"] - right["base"]


def judge(url: str, storage: Storage, adapter: AdapterRecord, records: Path, folder: Path) -> str:
    """Evaluate the adapter by a small suite, print what it shows, and write the adapter's page; returns its address."""
    from ft_service.evaluate.ask import Endpoint
    from ft_service.evaluate.run import Request, evaluate
    from ft_service.evaluate.summary import sentences
    from ft_service.pages.adapter_page import read_adapter, write_adapter_page

    texts = [json.loads(line)["text"] for line in (records / "docs.jsonl").read_text("utf-8").splitlines()]
    lines = [" ".join(text.split())[:JUDGED_CHARACTERS] for text in texts[:JUDGED_TEXTS]]
    (folder / "texts.txt").write_text("\n".join(lines), "utf-8")
    held_out = {"path": str(records / "heldout.jsonl"), "metrics": ["exact"], "limit": JUDGED_QUESTIONS}
    suite = {
        "name": "kinds",
        "held_out": [{**held_out, "max_tokens": ANSWER_TOKENS}],
        "texts": str(folder / "texts.txt"),
        "stability": {"limit": JUDGED_TWICE},
        "thresholds": {"min_items": JUDGED_QUESTIONS},
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite), "utf-8")
    evaluation = evaluate(Request(adapter.id, str(folder / "suite.yaml"), storage.root), Endpoint(url))
    for sentence in sentences(evaluation):
        console.print(f"  {sentence}", soft_wrap=True, markup=False)
    page = storage.uri(write_adapter_page(storage, [read_adapter(storage, adapter.id)]))
    console.print(f"  {page}", soft_wrap=True)
    return page


def percent_right(expected: list[str], answers: list[str]) -> float:
    right = (answer.strip().casefold() == wanted.casefold() for answer, wanted in zip(answers, expected, strict=True))
    return 100 * sum(right) / len(expected)


def print_next_steps(
    records: Path, registry: Registry, base: AdapterRecord, adapter: AdapterRecord, runs: list[RunFolder], page: str
) -> None:
    storage = registry.storage.root
    ft = Path(sys.executable).with_name("ft")
    lines = [
        *(f"Report   {run.storage.uri(run.path)}/report.html" for run in runs),
        f"Page     {page}",
        f"Records  {records}",
        f"Adapter  {registry.folder(adapter)}",
        "",
        "Try next:",
        f"  {ft} adapters verify {adapter.id} --storage {storage}",
        f"  {ft} serve --storage {storage} --base {registry.folder(base)}",
        "  and your own records: jobs/specs/tiny-cpu.yaml on a CPU, jobs/specs/lora.yaml with Llama 3.1 8B on GPUs",
    ]
    console.print(*lines, sep="\n", soft_wrap=True)


# -- processes and ports ---------------------------------------------------------------------------------------------


@contextmanager
def background(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command for as long as the block, with its output in a file."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=PROJECT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        with stopped_at_exit(process):
            yield process


@contextmanager
def stopped_at_exit(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Stop the process and all its descendants when the block ends, however it ends. Never touches other processes."""
    try:
        yield process
    finally:
        if process.poll() is None:
            family = [*psutil.Process(process.pid).children(recursive=True)]
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
            _, alive = psutil.wait_procs(family, timeout=STOP_SECONDS)
            for survivor in alive:
                survivor.kill()


def answers_in_time(
    url: str, process: subprocess.Popen[bytes], seconds: float, headers: dict[str, str] | None = None
) -> bool:
    """Wait until `url` answers 200; False if the process ends first, or after `seconds`."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(url, headers=headers, timeout=5, trust_env=False).status_code == httpx.codes.OK:
                return True
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    return False


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now; bound at the same time, so that they differ."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


if __name__ == "__main__":
    sys.exit(main())
