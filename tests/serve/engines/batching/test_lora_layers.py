"""Rows of different adapters in one batch get what stock peft computes for each adapter alone."""

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file

from serve.engines.batching import lora_layers
from serve.engines.batching.adapter_weights import LoadedAdapter, UnsupportedAdapterError
from tests.serve.engines.batching.lora_cases import KINDS, VOCABULARY, LoraWorld, forward, load, save_adapter

PROMPT = (5, 9, 3, 60, 17, 2, 33)
SPEAKERS: list[str | None] = [None, *KINDS]
Rows = list[tuple[str | None, tuple[int, ...]]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> LoraWorld:
    return LoraWorld(tmp_path_factory.mktemp("lora"))


def assert_like_stock(world: LoraWorld, rows: Rows) -> None:
    for (kind, ids), logits in zip(rows, world.batched_logits(rows), strict=True):
        difference = (logits - world.stock_logits(kind, ids)).abs().max().item()
        assert difference < 1e-5, f"{kind} differs by {difference}"


@pytest.mark.parametrize("kind", SPEAKERS)
def test_an_adapter_alone_computes_what_peft_computes(world: LoraWorld, kind: str | None) -> None:
    assert_like_stock(world, [(kind, PROMPT)])
    if kind is not None:
        changed = (world.stock_logits(kind, PROMPT) - world.stock_logits(None, PROMPT)).abs().max()
        assert changed > 0.05, "the adapter must change the logits for this test to mean anything"


def test_all_kinds_in_one_batch_compute_what_each_computes_alone(world: LoraWorld) -> None:
    assert_like_stock(world, [(kind, PROMPT) for kind in SPEAKERS])


def test_a_step_without_adapters_computes_exactly_the_base(world: LoraWorld) -> None:
    world.batched_logits([("DoRA", PROMPT), ("modules_to_save", PROMPT)])
    (logits,) = world.batched_logits([(None, PROMPT)])
    assert torch.equal(logits, world.stock_logits(None, PROMPT))


prompts = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=9).map(tuple)
batches = st.lists(st.tuples(st.sampled_from(SPEAKERS), prompts), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.lists(st.tuples(st.sampled_from(SPEAKERS), prompts), min_size=1, max_size=12), min_size=1, max_size=4
    )
)
def test_any_rows_in_any_order_compute_what_each_computes_alone(world: LoraWorld, steps: list[Rows]) -> None:
    for rows in steps:
        assert_like_stock(world, rows)


@pytest.fixture(params=["padded", "dense", "both", "by run"])
def forced_split(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs are split between the two products as the parameter says, whatever that costs."""

    def split(_: object, runs: list[lora_layers.Run]) -> object:
        used = list(dict.fromkeys(adapter for adapter, _ in runs if adapter is not None and adapter.groups))
        num_dense = {"padded": 0, "dense": len(used), "both": len(used) // 2, "by run": 0}[request.param]
        if request.param == "by run":  # so that one adapter has rows in both
            return [number % 2 == 0 for number in range(len(runs))]
        return [adapter in used[:num_dense] for adapter, _ in runs]

    monkeypatch.setattr(lora_layers.BatchedLora, "_split", split)
    yield request.param


@pytest.mark.parametrize("long", ["all-linear", "embedding and head"])
def test_each_way_to_compute_gives_the_same(world: LoraWorld, forced_split: str, long: str) -> None:
    assert_like_stock(world, [(kind, PROMPT[: 1 + number % 3]) for number, kind in enumerate(SPEAKERS)])
    assert_like_stock(world, [(long, PROMPT * 5), *((kind, PROMPT[:1]) for kind in SPEAKERS), (long, PROMPT)])


def test_adapters_that_come_and_go_keep_the_others_right(world: LoraWorld, forced_split: str) -> None:
    kinds = list(KINDS)
    for first in range(len(kinds)):
        assert_like_stock(world, [(kind, PROMPT[:2]) for kind in (kinds * 2)[first : first + 5]])
    assert_like_stock(world, [(kind, PROMPT[:2]) for kind in kinds])
    assert_like_stock(world, [(kind, PROMPT[:2]) for kind in kinds[:2]])


def test_a_step_that_failed_half_way_leaves_nothing_for_the_next_one(
    world: LoraWorld, forced_split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients ask again after a failure, so the same rows come back."""
    rows: Rows = [("all-linear", PROMPT), ("rank 8, rsLoRA", PROMPT), ("DoRA", PROMPT[:2])]
    world.batched_logits([(None, PROMPT), ("patterns", PROMPT)])

    def out_of_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("planted")

    places = [(lora_layers._Group, "bind"), (lora_layers._Rows, "arrange")]
    if forced_split != "dense":
        places.append((lora_layers._PaddedStack, "_write"))
    for owner, name in places:
        world.batched_logits([(None, PROMPT)])
        world.lora._padded.clear()
        with monkeypatch.context() as planted:
            planted.setattr(owner, name, out_of_memory)
            with pytest.raises(torch.OutOfMemoryError):
                world.batched_logits(rows)
        assert_like_stock(world, rows)


def test_what_overflows_in_one_adapter_stays_in_its_rows(world: LoraWorld, forced_split: str) -> None:
    kinds: list[str | None] = [None, "all-linear", "DoRA", "patterns"]
    layer = world.model.model.layers[0].self_attn.q_proj
    weights = world.adapters["all-linear"].groups[layer.site.group]
    kept = weights.a_IR.clone()
    x_1NI = 100 * torch.randn(1, 2 * len(kinds), 32, generator=torch.Generator().manual_seed(0))

    @torch.inference_mode()
    def compute() -> torch.Tensor:
        world.lora._forget()
        world.set_rows([(kind, 2) for kind in kinds])
        return layer(x_1NI.clone())[0].view(len(kinds), -1)  # the layers of a group compute x A once for each tensor

    expected = compute()
    try:
        weights.a_IR.fill_(3e38)
        got = compute()
    finally:
        weights.a_IR.copy_(kept)
        world.lora._forget()
    assert not got[1].isfinite().all()
    others = [0, 2, 3]
    assert torch.equal(got[others], expected[others])


def test_a_prefill_chunk_goes_beside_decoding_rows(world: LoraWorld) -> None:
    """The head sees fewer rows than the layers below it."""
    runs: Rows = [
        ("all-linear", PROMPT[:1]),
        ("embedding and head", PROMPT),
        (None, PROMPT[:1]),
        ("modules_to_save", PROMPT[:3]),
    ]
    lengths = [len(ids) for _, ids in runs]
    logit_rows = [1, 2, 0, 1]
    adapters = [world.adapters[kind] if kind else None for kind, _ in runs]
    world.lora.set_rows(adapters, lengths, logit_rows)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    kept = [row for end, count in zip(ends, logit_rows, strict=True) for row in range(end - count, end)]
    with torch.inference_mode():
        logits = forward(world.model, [ids for _, ids in runs], logits_to_keep=torch.tensor(kept))
    for (kind, ids), count, got in zip(runs, logit_rows, logits.split(logit_rows), strict=True):
        torch.testing.assert_close(got, world.stock_logits(kind, ids)[len(ids) - count :], atol=1e-5, rtol=1e-5)


def test_on_a_cpu_the_change_of_a_bf16_base_is_computed_in_fp32_as_by_peft(tmp_path: Path, forced_split: str) -> None:
    kinds = {kind: KINDS[kind] for kind in ("all-linear", "rank 8, rsLoRA", "patterns", "excluded")}
    world = LoraWorld(tmp_path, kinds, dtype=torch.bfloat16)
    num_rows = 50
    x_1NI = torch.randn(1, num_rows * len(kinds), 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    world.set_rows([(kind, num_rows) for kind in kinds])
    with torch.inference_mode():
        for layer in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"):
            got = world.model.model.layers[0].get_submodule(layer)(x_1NI.clone())[0].split(num_rows)
            for kind, x_NI, ours in zip(kinds, x_1NI[0].split(num_rows), got, strict=True):
                stock = PeftModel.from_pretrained(copy.deepcopy(world.base), world.folders[kind]).base_model.model
                expected = stock.model.layers[0].get_submodule(layer)(x_NI)
                is_equal = ours == expected
                # The same numbers in another order of summation: now and then the last bit is another one.
                assert is_equal.float().mean() > 0.99, f"{kind}, {layer}: {is_equal.float().mean():.3f}"
                torch.testing.assert_close(ours, expected, rtol=2**-7, atol=1e-6)


def test_room_for_an_adapter_of_a_bf16_base_on_a_cpu_is_kept_for_fp32(tmp_path: Path) -> None:
    world = LoraWorld(tmp_path, {"all-linear": KINDS["all-linear"]}, dtype=torch.bfloat16)
    stored = load_file(world.folders["all-linear"] / "adapter_model.safetensors")
    num_weights = sum(tensor.numel() for tensor in stored.values())
    assert world.adapters["all-linear"].nbytes == num_weights * world.lora.bytes_per_number == num_weights * 4


def test_layers_with_a_bias_and_tied_embeddings(tmp_path: Path) -> None:
    kinds = {kind: KINDS[kind] for kind in ("all-linear", "DoRA", "modules_to_save", "lora_bias")}
    world = LoraWorld(tmp_path, kinds, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    for name, parameter in world.model.named_parameters():
        assert name.endswith("weight") or not parameter.any()
    assert_like_stock(world, [(kind, PROMPT) for kind in (None, *kinds)])


@pytest.mark.slow
def test_a_base_in_4_bits(tmp_path: Path) -> None:
    """DoRA needs the norms of the weights that bitsandbytes has packed, before and after forward passes."""
    kinds = {kind: KINDS[kind] for kind in ("all-linear", "DoRA", "modules_to_save")}
    world = LoraWorld(tmp_path, kinds, in_4bit=True, hidden_size=64, intermediate_size=128)
    rows: Rows = [("all-linear", PROMPT), (None, PROMPT), ("DoRA", PROMPT), ("modules_to_save", PROMPT)]
    assert_like_stock(world, rows)
    world.adapters["DoRA"] = load(world.lora, world.folders["DoRA"], "loaded again")
    assert_like_stock(world, rows)
    whole_layer = save_adapter(world.plain, tmp_path / "whole", target_modules=["q_proj"], modules_to_save=["up_proj"])
    with pytest.raises(UnsupportedAdapterError, match=r"up_proj, which is quantised"):
        load(world.lora, whole_layer, "whole layer")


def test_the_number_of_operations_does_not_grow_with_the_number_of_adapters(tmp_path: Path, forced_split: str) -> None:
    kinds = {f"{number}": {"target_modules": "all-linear", "r": 2 + number % 3} for number in range(16)}
    world = LoraWorld(tmp_path, kinds)

    def operations(num_adapters: int) -> int:
        names = list(kinds)[:num_adapters]
        rows: Rows = [(name, PROMPT[:1]) for name in names for _ in range(16 // num_adapters)]
        world.batched_logits(rows)  # the stacks are built
        with Operations() as counted:
            forward(world.model, [ids for _, ids in rows])
        return counted.count

    assert operations(4) == operations(8) == operations(16)


def test_weights_of_adapters_in_the_batch_are_counted_in_bytes(world: LoraWorld) -> None:
    world.batched_logits([("all-linear", PROMPT)])
    adapter = world.adapters["all-linear"]
    rank_elements = sum(sum(sizes) for sizes in ((32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)))
    assert adapter.nbytes == 2 * 4 * rank_elements * 4  # two layers, rank 4, fp32
    world.batched_logits([("all-linear", PROMPT), ("rank 8, rsLoRA", PROMPT), ("DoRA", PROMPT)])
    assert world.lora.stack_bytes >= adapter.nbytes


class Operations(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the operations that would be launched: all but views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


# -- which way is cheaper --------------------------------------------------------------------------------------------


def split_of(world: LoraWorld, counts: list[int], monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """How many adapters with so many rows each go to the dense and to the padded product, at a width of 384."""
    monkeypatch.setattr(world.lora, "_launch", lora_layers._LAUNCH / 384)
    adapters = [LoadedAdapter(f"{n}", f"{n}", {0: None}, {}, {}, {}, {}, 16, False) for n in range(len(counts))]  # type: ignore[dict-item]
    is_dense = world.lora._split(list(zip(adapters, counts, strict=True)))
    num_dense = sum(is_dense)
    assert is_dense == [True] * num_dense + [False] * (len(adapters) - num_dense)  # the ones with most rows
    return num_dense, len(adapters) - num_dense


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([64], (1, 0)),
        ([1], (1, 0)),
        ([16] * 4, (0, 4)),
        ([2] * 32, (0, 32)),
        ([512, *[1] * 31], (1, 31)),
        ([512, 400, *[1] * 30], (2, 30)),
        ([33, *[1] * 31], (1, 31)),
    ],
)
def test_adapters_with_many_rows_are_dense_and_the_others_padded(
    world: LoraWorld, monkeypatch: pytest.MonkeyPatch, counts: list[int], expected: tuple[int, int]
) -> None:
    assert split_of(world, counts, monkeypatch) == expected


def test_an_adapter_may_prefill_by_the_dense_product_and_decode_by_the_padded_one(
    world: LoraWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the rows of each product are neighbours, and none is computed for the other's."""
    monkeypatch.setattr(world.lora, "_launch", lora_layers._LAUNCH / 384)
    adapters = [LoadedAdapter(name, name, {0: None}, {}, {}, {}, {}, 16, False) for name in "abcd"]  # type: ignore[dict-item]
    runs: list[lora_layers.Run] = [(None, 2), *((adapter, 4) for adapter in adapters), (adapters[0], 64)]
    is_dense = [False] * 5 + [True]
    assert world.lora._split(runs) == is_dense
    stack = lora_layers._DenseStack([], (adapters[0],))
    places = {adapter: place for place, adapter in enumerate(adapters)}
    layout = lora_layers._Layout(runs, is_dense, stack, places, 4, ())
    assert layout.dense_rows == slice(18, 82)
    assert layout.padded_rows == list(range(2, 18))


def test_adapters_that_stay_get_a_dense_stack_once_its_cost_would_have_been_saved(
    world: LoraWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world.lora, "_launch", lora_layers._LAUNCH / 384)
    monkeypatch.setattr(world.lora, "_missed", {})

    def split(names: Iterable[str]) -> list[bool]:
        adapters = [LoadedAdapter(name, name, {0: None}, {}, {}, {}, {}, 16, False) for name in names]  # type: ignore[dict-item]
        return world.lora._split([(adapter, 4) for adapter in adapters])

    kept = [split("ab" if step % 2 else "ba") for step in range(50)]  # whichever order the runs have
    assert kept[0] == [False] * 2  # in the first step it would cost more than it saves
    assert [True] * 2 in kept
    assert all(split([f"{step}", "b"]) == [False] * 2 for step in range(100))
