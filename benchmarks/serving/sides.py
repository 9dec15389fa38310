"""The sides that run in a process of their own without HTTP: our engine, and stock transformers and peft.

python -m benchmarks.serving.sides SIDE --world FOLDER --batch 16 --threads 2 [--core 0]
"""

import argparse
import asyncio
import os
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

from benchmarks.serving.work import Ask, Round, Timing, World, answer_rounds, ask_all, asks_of, cpu_seconds, report

Measure = Callable[[Round], dict[str, Any]]


def engine_side(world: World, batch: int) -> Measure:
    """Our engine in this process, with a client task for each request in flight."""
    engine, records = _engine(world, batch)
    loop = asyncio.new_event_loop()

    def measure(work: Round) -> dict[str, Any]:
        from serve.engines.engine import GenerationRequest, Sampling

        async def stream(ask: Ask) -> AsyncGenerator[int, None]:
            request = GenerationRequest(
                id="benchmark",
                prompt_ids=tuple(ask.prompt_ids),
                adapter=None if ask.adapter is None else records[ask.adapter],
                max_tokens=ask.answer_tokens,
                end_ids=frozenset(),
                sampling=Sampling(temperature=0.0),
            )
            async for chunk in engine.generate(request):
                yield len(chunk.token_ids)

        asks = asks_of(work)
        steps = engine.stats().counters["steps"]
        cpu = cpu_seconds()
        began = time.perf_counter()
        timings = loop.run_until_complete(ask_all(stream, asks, work.clients))
        seconds = time.perf_counter() - began
        return report(timings, seconds, cpu_seconds() - cpu, steps=engine.stats().counters["steps"] - steps)

    return measure


def load_side(world: World, batch: int) -> Measure:
    """What the first request of an adapter costs more than the next: `requests` pairs, one at a time."""
    engine, records = _engine(world, batch)
    loop = asyncio.new_event_loop()

    async def seconds(ask: Ask, adapter: Any) -> float:
        from serve.engines.engine import GenerationRequest, Sampling

        greedy = Sampling(temperature=0.0)
        request = GenerationRequest("benchmark", tuple(ask.prompt_ids), adapter, 1, frozenset(), greedy)
        began = time.perf_counter()
        async for _ in engine.generate(request):
            pass
        return time.perf_counter() - began

    async def pairs(work: Round) -> list[float]:
        asks = iter(asks_of(Round(**{**vars(work), "requests": 2 * work.requests})))
        added = []
        for number in range(work.requests):
            record = records[number % len(records)]
            await engine.unload(record.digest)
            cold = await seconds(next(asks), record)
            added.append(cold - await seconds(next(asks), record))
        return added

    return lambda work: {"added": loop.run_until_complete(pairs(work))}


def _engine(world: World, batch: int) -> tuple[Any, list[Any]]:
    """As a replica makes it: what was imported is not looked at again by the garbage collector, which takes 0.3 s."""
    from ft_service.registry.registry import Registry
    from ft_service.storage.storage import Storage
    from serve.replica import make_engine
    from serve.settings import BaseSettings

    registry = Registry(Storage(world.storage))
    settings = BaseSettings(base=world.base, dtype=world.dtype, max_batch=batch)  # type: ignore[arg-type]
    records = [registry.resolve(adapter_id) for adapter_id in world.adapter_ids]
    return make_engine(settings, registry), records


def generate_side(world: World, batch: int) -> Measure:
    """`generate` of stock transformers: full static batches of equal lengths, so that nothing waits or is padded."""
    generate = _Generate(world)

    def measure(work: Round) -> dict[str, Any]:
        asks = asks_of(work)
        return _timed(lambda: [generate(asks[at : at + batch]) for at in range(0, len(asks), batch)])

    return measure


def switching_side(world: World, batch: int) -> Measure:
    """A plain peft server: as many requests as there are clients wait; it answers all of one adapter in a batch."""
    from peft import PeftModel

    generate = _Generate(world)
    adapted: Any = None

    def measure(work: Round) -> dict[str, Any]:
        nonlocal adapted
        if adapted is None:
            adapted = PeftModel.from_pretrained(generate.model, world.adapter_folders[0], adapter_name="0")
            for index in range(1, work.adapters):
                adapted.load_adapter(world.adapter_folders[index], adapter_name=str(index))
            adapted.eval()
            generate.model = adapted
        coming = asks_of(work)

        def serve() -> list[int]:
            done = []
            waiting = coming[: work.clients]
            left = coming[work.clients :]
            while waiting:
                adapter = waiting[0].adapter
                chosen = [ask for ask in waiting if ask.adapter == adapter][:batch]
                adapted.set_adapter(str(adapter))
                done.append(generate(chosen))
                waiting = [ask for ask in waiting if ask not in chosen] + left[: len(chosen)]
                left = left[len(chosen) :]
            return done

        return _timed(serve)

    return measure


class _Generate:
    def __init__(self, world: World) -> None:
        import torch
        from transformers import LlamaForCausalLM

        self.model: Any = LlamaForCausalLM.from_pretrained(world.base, dtype=getattr(torch, world.dtype)).eval()

    def __call__(self, asks: list[Ask]) -> int:
        """The number of tokens that it generated."""
        import torch

        input_ids = torch.tensor([ask.prompt_ids for ask in asks])
        output = self.model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=asks[0].answer_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return int((output.shape[1] - input_ids.shape[1]) * len(asks))


def _timed(work: Callable[[], list[int]]) -> dict[str, Any]:
    cpu = cpu_seconds()
    began = time.perf_counter()
    tokens = work()
    ended = time.perf_counter()
    return report([Timing(began, None, ended, sum(tokens))], ended - began, cpu_seconds() - cpu, batches=len(tokens))


SIDES: dict[str, Callable[[World, int], Measure]] = {
    "base": engine_side,
    "one": engine_side,
    "four": engine_side,
    "thirty-two": engine_side,
    "direct": engine_side,
    "load": load_side,
    "generate": generate_side,
    "switching": switching_side,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("--world", type=Path, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--core", type=int)
    parser.add_argument("--profile", type=Path)
    arguments = parser.parse_args()
    if arguments.core is not None:
        os.sched_setaffinity(0, {arguments.core})
    import torch

    torch.set_num_threads(arguments.threads)
    answer_rounds(SIDES[arguments.side](World.read(arguments.world), arguments.batch))


if __name__ == "__main__":
    main()
