"""The whole way on a laptop: records, base model, adapter, server, and proof that the adapter knows more than its base.

python examples/quickstart/quickstart.py [--folder quickstart]

Offline, on two CPU cores. Everything it starts, it ends; what it made stays in the folder.
"""

import argparse
import json
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
SPECS = Path(__file__).resolve().parent.relative_to(ROOT)
sys.path.insert(0, str(ROOT))  # the checkout is not installed

from examples.quickstart.records import write_records
from ft_service.errors import ClusterError, FtError, TrainingError
from ft_service.registry import AdapterRecord, Registry
from ft_service.runs import RunFolder, new_run_id
from ft_service.storage import Storage

NUM_CPUS = 2
OBJECT_STORE_BYTES = 200 * 1024 * 1024
RAY_START_SECONDS = 90
SERVE_START_SECONDS = 180
STOP_SECONDS = 15
ANSWER_SECONDS = 60
QUESTIONS_PER_ANSWER = 40
ANSWER_TOKENS = 8
PARALLEL_REQUESTS = 8
WANTED_POINTS = 60
SCRATCH_MODEL = {"hidden_size": 192, "num_layers": 4, "num_heads": 3, "num_kv_heads": 1, "intermediate_size": 512}
VOCAB_SIZE = 2048

console = Console(highlight=False)


@dataclass(frozen=True)
class Cluster:
    """A Ray head of our own, and the environment in which its token and address are known."""

    dashboard: str
    environment: dict[str, str]


@dataclass
class Answers:
    """What one model answered to the held-out questions."""

    model: str
    texts: list[str] = field(default_factory=list)

    def right(self, questions: list[dict[str, str]]) -> list[bool]:
        return [
            text.strip().casefold() == question["output"]
            for text, question in zip(self.texts, questions, strict=True)
        ]

    def percent(self, questions: list[dict[str, str]]) -> float:
        return 100 * sum(self.right(questions)) / len(questions)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("quickstart"), help="where records, runs and adapter go")
    folder = parser.parse_args().folder.absolute()
    try:
        return quickstart(folder)
    except FtError as error:
        console.print(f"[red]Failed:[/red] {error}", soft_wrap=True)
    except KeyboardInterrupt:
        console.print("Interrupted; everything that was started has been ended.")
    return 1


def quickstart(folder: Path) -> int:
    """All steps; returns the exit code."""
    began = time.monotonic()
    storage = Storage(str(folder / "storage"))
    with step(1, "Records from the installed standard library's documentation"):
        counts = write_records(folder / "records")
        console.print(*(f"  {name}: {count:,} records" for name, count in counts.items()), sep="\n")
    with step(2, "A Llama with random weights, and its tokenizer"):
        scratch = write_scratch(folder)
    with ray_head() as cluster:
        with step(4, "Base model: a full run over the documentation"):
            base = train(cluster, storage, "base", folder, scratch)
        with step(5, "Adapter: LoRA on that base, 2 DeepSpeed workers"):
            adapter = train(cluster, storage, "adapter", folder, Registry(storage).folder(base))
        with server(cluster, storage, base) as url, step(7, "Held-out questions to base and adapter"):
            questions = held_out_questions(folder / "records" / "heldout.jsonl")
            answers = [ask(url, model, questions) for model in (base.id, adapter.id)]
    gain = compare(questions, *answers)
    console.print(f"\nDone in {time.monotonic() - began:.0f} s. Ray and the server are stopped.")
    say_what_next(folder, adapter, base)
    if gain < WANTED_POINTS:
        console.print(f"[red]The adapter gained {gain:.0f} points; {WANTED_POINTS} were expected.[/red]")
        return 1
    return 0


@contextmanager
def step(number: int, title: str) -> Iterator[None]:
    """Announce a step, and say how long it took."""
    console.rule(f"[bold]{number}/7  {title}", align="left")
    began = time.monotonic()
    yield
    console.print(f"  [dim]{time.monotonic() - began:.0f} s[/dim]")


# -- the steps -------------------------------------------------------------------------------------------------------


def write_scratch(folder: Path) -> Path:
    from ft_service.model.scratch import train_tokenizer, write_scratch_model

    docs = (folder / "records" / "docs.jsonl").read_text(encoding="utf-8").splitlines()
    tokenizer = train_tokenizer((json.loads(line)["text"] for line in docs), VOCAB_SIZE)
    scratch = folder / "scratch"
    write_scratch_model(scratch, tokenizer=tokenizer, seed=0, **SCRATCH_MODEL)
    console.print(f"  {len(tokenizer):,} tokens, {(scratch / 'model.safetensors').stat().st_size / 4e6:.1f} M parameters")
    return scratch


@contextmanager
def ray_head() -> Iterator[Cluster]:
    """A Ray of our own, beside any other on this machine: free ports, own folder, own token."""
    # Ray's socket paths lie below this folder and may not be longer than 107 bytes.
    session = Path(tempfile.mkdtemp(prefix="ftq", dir="/tmp"))
    gcs_port, dashboard_port, client_port = free_ports(3)
    address = f"127.0.0.1:{gcs_port}"
    environment = clean_environment() | {
        "RAY_ADDRESS": address,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    cluster = Cluster(f"http://127.0.0.1:{dashboard_port}", environment)
    command = ["ray", "start", "--head", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1"]
    command += [f"--port={gcs_port}", f"--ray-client-server-port={client_port}", "--dashboard-agent-listen-port=0"]
    command += ["--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={session}"]
    command += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}"]
    command += [f"--num-cpus={NUM_CPUS}", "--num-gpus=0", f"--object-store-memory={OBJECT_STORE_BYTES}"]
    with background(command, environment, session / "ray.log") as head:
        with step(3, "A local Ray"):
            headers = {"Authorization": f"Bearer {environment['RAY_AUTH_TOKEN']}"}
            wait_for(f"{cluster.dashboard}/api/jobs/", head, RAY_START_SECONDS, ClusterError, session / "ray.log", headers)
            console.print(f"  dashboard {cluster.dashboard}  (it asks for a token: {environment['RAY_AUTH_TOKEN']})")
        yield cluster
    shutil.rmtree(session, ignore_errors=True)


def train(cluster: Cluster, storage: Storage, name: str, folder: Path, base: Path) -> AdapterRecord:
    """Submit ``NAME.yaml`` with `ray job submit`, follow its log, and return what it published."""
    run_id = new_run_id(name)
    command = ["ray", "job", "submit", f"--address={cluster.dashboard}", f"--working-dir={ROOT}", "--"]
    command += ["python", "jobs/train.py", str(SPECS / f"{name}.yaml"), f"--run-id={run_id}"]
    command += [f"storage={storage.root}", f"model.base={base}"]
    records = {"base": "docs.jsonl", "adapter": "train.jsonl"}[name]
    source = {"path": str(folder / "records" / records)}
    print(source)
    console.print(f"  [dim]{' '.join(command)}[/dim]", soft_wrap=True)
    if (code := subprocess.run(command, cwd=ROOT, env=cluster.environment).returncode) != 0:
        raise TrainingError(f"run {run_id} ended with exit code {code}; its log is above.")
    status = RunFolder(storage, run_id).status()
    if status is None or status.published is None:
        raise TrainingError(f"run {run_id} published nothing on {storage.root}; its log is above.")
    return Registry(storage).resolve(status.published)
