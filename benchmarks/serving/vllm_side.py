"""vLLM's engine in a process of its own environment: `python vllm_side.py --world FOLDER --batch 16 --threads 2`."""

import argparse
import asyncio
import os
import sys
import time
from collections.abc import AsyncGenerator
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.serving.work import Ask, Round, World, answer_rounds, ask_all, asks_of, report


async def make_engine(world: World, batch: int) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = AsyncEngineArgs(
        model=world.base,
        dtype=world.dtype,
        max_num_seqs=batch,
        max_model_len=1024,
        enable_lora=True,
        max_loras=4,
        max_cpu_loras=32,
        max_lora_rank=16,
        enforce_eager=True,
        enable_log_requests=False,
    )
    return AsyncLLM.from_engine_args(arguments)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--world", type=Path, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{arguments.threads - 1}" if arguments.threads > 1 else "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    world = World.read(arguments.world)
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    engine = loop.run_until_complete(make_engine(world, arguments.batch))

    def measure(work: Round) -> dict[str, Any]:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        async def stream(ask: Ask) -> AsyncGenerator[int, None]:
            number = ask.adapter
            lora = None if number is None else LoRARequest(str(number), number + 1, world.adapter_folders[number])
            sampling = SamplingParams(temperature=0.0, max_tokens=ask.answer_tokens, ignore_eos=True, detokenize=True)
            prompt = {"prompt_token_ids": ask.prompt_ids}
            done = 0
            request_id = f"{work.number}-{time.perf_counter_ns()}"
            async for output in engine.generate(prompt, sampling, request_id, lora_request=lora):
                tokens = len(output.outputs[0].token_ids)
                yield tokens - done
                done = tokens

        cpu = _cpu_seconds()
        began = time.perf_counter()
        timings = loop.run_until_complete(ask_all(stream, asks_of(work), work.clients))
        seconds = time.perf_counter() - began
        return report(timings, seconds, _cpu_seconds() - cpu, version=version("vllm"))

    answer_rounds(measure)


def _cpu_seconds() -> float:
    """Of this process and of its engine's."""
    import psutil

    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(each.user + each.system for each in times)


if __name__ == "__main__":
    main()
