"""What each kind of process imports before it is of use; each in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ft_service.publish import publish
from ft_service.runs.folder import RunFolder
from ft_service.runs.metrics import read_metrics
from tests.worlds import prepared_run, write_world

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[1]
COMPILER = ("torch._dynamo.eval_frame", "torch._inductor", "triton")
"""Parts of torch's compiler; its package has a stand-in where it is left out."""
UNUSED = ("scipy.optimize", "sklearn", "sympy", *COMPILER)
"""What transformers and torch import, and nobody here calls."""
SECONDS = 300

WORKER = """
import os, sys
from ft_service.model.light_imports import light_imports
with light_imports(four_bit={four_bit}):
    from ft_service.train.parallel import import_deepspeed
    from ft_service.train.worker import run_worker
    import_deepspeed(use_gpu=False)
run_worker({storage!r}, {run_id!r})
{report}
sys.stdout.flush()
os._exit(0)
"""
REPLICA = """
import asyncio
from ft_service.registry.registry import Registry
from ft_service.storage.storage import Storage
from serve.engines.engine import GenerationRequest
from serve.replica import make_engine
from serve.settings import BaseSettings

registry = Registry(Storage({storage!r}))

async def answer():
    engine = make_engine(BaseSettings(base={base!r}, cache_gib=0.1), registry)
    adapter = registry.resolve({model!r})
    request = GenerationRequest("x", (5, 6, 7), adapter, 3, frozenset())
    assert sum([len(chunk.token_ids) async for chunk in engine.generate(request)]) == 3
    await engine.close()

asyncio.run(answer())
import transformers
assert "LlamaForCausalLM" in dir(transformers)
assert "MistralForCausalLM" not in dir(transformers), "the source of all model families was read"
"""
REPORT = """
import json, sys
print("imported", json.dumps([name for name, module in list(sys.modules.items()) if module is not None]), flush=True)
"""


def imported_by(code: str) -> set[str]:
    """The modules of a Python process after it has run `code`, which ends with `REPORT`."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("imported "))
    return set(json.loads(line.removeprefix("imported ")))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    yield folder


def worker(run: RunFolder, four_bit: bool) -> set[str]:
    """What a worker of a prepared run has imported when it has trained."""
    code = WORKER.format(four_bit=four_bit, storage=run.storage.root, run_id=run.run_id, report=REPORT)
    modules = imported_by(code)
    assert [m.step for m in read_metrics(run.storage, run.run_id)] == [1, 2, 3, 4]
    return modules


@pytest.fixture(scope="module")
def light(world: Path) -> RunFolder:
    """A LoRA run trained without bitsandbytes and the compiler."""
    run = prepared_run(world, "light", 1)
    assert "bitsandbytes" not in worker(run, four_bit=False)
    return run


@pytest.mark.parametrize(
    "settings",
    [
        {"parallel.zero_stage": "3", "train.activation_checkpointing": "true"},
        {"method": "{type: full}"},
        {"method": "{type: lora, use_dora: true}"},
    ],
    ids=["recomputed lora under ZeRO-3", "full", "DoRA"],
)
def test_a_worker_without_4_bit_weights_imports_neither_bitsandbytes_nor_the_compiler(
    world: Path, request: pytest.FixtureRequest, settings: dict[str, str]
) -> None:
    run = prepared_run(world, request.node.callspec.id.lower().replace(" ", "-"), 1, **settings)
    modules = worker(run, four_bit=False)
    assert {"torch", "peft", "deepspeed"} <= modules
    assert not modules & {"bitsandbytes", *UNUSED}


def test_light_and_whole_imports_train_alike(world: Path, light: RunFolder) -> None:
    whole = prepared_run(world, "whole", 1)
    assert "bitsandbytes" in worker(whole, four_bit=True)
    losses = [[m.loss for m in read_metrics(run.storage, run.run_id)] for run in (light, whole)]
    assert losses[0] == losses[1]


def test_a_qlora_worker_imports_bitsandbytes_and_trains(world: Path) -> None:
    run = prepared_run(world, "qlora", 1, method="{type: qlora, lora_rank: 4}")
    assert "bitsandbytes.nn" in worker(run, four_bit=True)


def test_4_bit_weights_in_a_process_without_bitsandbytes_are_one_message(world: Path) -> None:
    run = prepared_run(world, "undecided", 1, method="{type: qlora, lora_rank: 4}")
    code = WORKER.format(four_bit=False, storage=run.storage.root, run_id=run.run_id, report=REPORT)
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode != 0
    assert "ModelError: method.type = 'qlora': this process was started without 4-bit weights" in done.stderr


def test_the_compiler_that_is_left_out_is_there_for_whoever_asks(world: Path) -> None:
    code = """
from ft_service.model.light_imports import light_imports
with light_imports(four_bit=False):
    import peft
    from transformers import masking_utils
    from transformers.distributed import tensor_parallel
import sys
assert "torch._dynamo.eval_frame" not in sys.modules
import torch
assert not isinstance(torch.zeros(1), tensor_parallel.DTensor)
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item() == 2
with masking_utils.TransformGetItemToIndex():
    pass
from torch.distributed.tensor import DTensor, Shard
assert tensor_parallel.DTensor.from_local == DTensor.from_local and tensor_parallel.Shard(1) == Shard(1)
"""
    assert "torch._dynamo.eval_frame" in imported_by(code + REPORT)


def test_shapes_on_the_meta_device_need_no_sympy_until_somebody_asks_for_it() -> None:
    code = """
import sys
import pytest
from ft_service.model.light_imports import light_imports, plain_shapes
with light_imports(four_bit=False):
    import torch
with plain_shapes():
    assert (2.0 ** torch.ones(2, 1, device="meta") * torch.ones(3, device="meta")).shape == (2, 3)
    assert "sympy.core" not in sys.modules
    with pytest.raises(RuntimeError, match="broadcastable"):
        torch.ones(2, device="meta").pow(torch.ones(3, device="meta"))
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    import sympy.core
    assert sympy.Integer(2) + 1 == 3 and ShapeEnv()
assert "sympy.core" in sys.modules
assert (2.0 ** torch.ones(2, 1, device="meta") * torch.ones(3, device="meta")).shape == (2, 3)
"""
    assert "sympy" in imported_by(code + REPORT)


def test_a_replica_answers_as_a_lora_adapter_without_bitsandbytes_and_the_compiler(
    world: Path, light: RunFolder
) -> None:
    adapter = publish(light)
    modules = imported_by(
        REPLICA.format(storage=light.storage.root, base=str(world / "base"), model=adapter.id) + REPORT
    )
    assert {"torch", "peft"} <= modules
    assert not modules & {"bitsandbytes", "deepspeed", "matplotlib", *UNUSED}


def test_a_replica_imports_no_model_code_before_it_prepares_its_imports() -> None:
    modules = imported_by(f"import serve.replica\n{REPORT}")
    assert "ray.serve" in modules and not modules & {"torch", "transformers", "peft"}


@pytest.mark.parametrize("module", ["cli.app", "spec.schema", "plan.plan", "registry.registry", "runs.folder"])
def test_what_decides_and_records_starts_without_torch_and_ray(module: str) -> None:
    assert not imported_by(f"import ft_service.{module}\n{REPORT}") & {"torch", "ray", "transformers"}


def test_help_starts_without_torch_and_ray() -> None:
    assert not ft("--help") & {"torch", "ray", "transformers"}


def test_a_plan_needs_neither_torch_nor_ray(world: Path) -> None:
    spec = world / "spec.yaml"
    spec.write_text((world / "storage/runs" / prepared_run(world, "planned", 1).run_id / "spec.yaml").read_text())
    assert not ft("plan", str(spec)) & {"torch", "ray", "matplotlib", "peft"}


def ft(*arguments: str) -> set[str]:
    """What an `ft` command has imported when it ends."""
    code = f"""
import atexit, sys
sys.argv = ["ft", *{arguments!r}]
@atexit.register
def report():
    {REPORT.strip().splitlines()[0]}
    {REPORT.strip().splitlines()[1]}
from ft_service.cli.app import main
main()
"""
    return imported_by(code)


def test_a_driver_imports_no_model_code_before_it_asks_for_workers() -> None:
    modules = imported_by(f"import ft_service.launch\n{REPORT}")
    assert {"ray.train", "ft_service.train.worker_group"} <= modules
    model_code = {"torch", "peft", "deepspeed", "bitsandbytes", "transformers.modeling_utils", *COMPILER}
    assert not modules & {"matplotlib", *model_code}


def test_a_controller_imports_no_model_code() -> None:
    modules = imported_by(f"import ft_service.train.worker_group\n{REPORT}")
    assert "ray.train" in modules and not modules & {"torch", "transformers", "peft", "deepspeed", "matplotlib"}


def test_ray_imports_little_before_a_worker_prepares_its_imports() -> None:
    modules = imported_by(f"import ft_service.train.ray_worker\n{REPORT}")
    assert {"ray.train", "ft_service.train.ray_worker"} <= modules
    later = {"torch", "transformers", "pydantic_settings", "ft_service.train.worker_group", "ft_service.spec.schema"}
    assert not modules & {*later, "ray.train.v2._internal.callbacks"}
