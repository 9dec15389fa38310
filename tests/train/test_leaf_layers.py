"""What DeepSpeed sees of a model whose decoder layers are gathered as one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero import partition_parameters, partitioned_param_coordinator, stage3
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import nvtx
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ft_service.train import gathers


@pytest.fixture
def model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=2, **sizes))  # type: ignore[arg-type]
    gathers.gather_whole_layers(model, persistence_threshold=0)
    return model


def test_no_module_inside_a_layer_is_listed(model: LlamaForCausalLM) -> None:
    listed = list(model.modules())
    assert set(listed) >= {model, model.lm_head, model.model.embed_tokens, *model.model.layers}
    assert not any(module is model.model.layers[0].mlp for module in listed)
    every = set(nn.Module.modules(model))
    inside = {inner for layer in model.model.layers for inner in nn.Module.modules(layer)} - {*model.model.layers}
    assert set(listed) == every - inside
    assert set(model.modules(remove_duplicate=False)) == every


def test_all_parameters_are_listed_and_only_once_looked_for(model: LlamaForCausalLM) -> None:
    for module in (model, *model.model.layers):
        stock = list(nn.Module.named_parameters(module))
        found = list(module.named_parameters())
        assert [name for name, _ in found] == [name for name, _ in stock]
        assert all(one is other for (_, one), (_, other) in zip(found, stock, strict=True))
        assert dict(module.named_parameters(prefix="a")).keys() == {f"a.{name}" for name, _ in stock}
        assert dict(module.named_parameters(recurse=False)) == {}
    model.model.layers[0].register_parameter("late", nn.Parameter(torch.empty(1)))
    assert "model.layers.0.late" not in dict(model.named_parameters())


def test_hooks_of_a_layer_see_no_adapter_and_a_forward_pass_gathers_those_that_are_missing(
    model: LlamaForCausalLM,
) -> None:
    adapters: list[Any] = [layer.mlp.gate_proj.weight for layer in model.model.layers]
    gathered: list[Any] = []

    def all_gather(parameters: list[Any]) -> None:
        gathered.extend(parameters)
        for parameter in parameters:
            parameter.ds_status = ZeroParamStatus.AVAILABLE

    for adapter in adapters:
        adapter.ds_persist = False
        adapter.ds_status = ZeroParamStatus.NOT_AVAILABLE
        adapter.all_gather = all_gather
    optimizer = SimpleNamespace(persistent_parameters=[])
    gathers.keep_gathered(optimizer, model, adapters)
    assert optimizer.persistent_parameters == adapters and all(adapter.ds_persist for adapter in adapters)
    listed = {id(parameter) for layer in model.model.layers for parameter in layer.parameters()}
    assert len(listed) == 2 * (9 - 1) and not listed & {id(adapter) for adapter in adapters}
    assert {id(parameter) for parameter in model.parameters()} >= {id(adapter) for adapter in adapters}
    ids = torch.zeros(1, 3, dtype=torch.long, device="meta")
    model(ids)
    assert [id(adapter) for adapter in gathered] == [id(adapter) for adapter in adapters]
    adapters[1].ds_status = ZeroParamStatus.NOT_AVAILABLE
    model(ids)
    assert len(gathered) == 3 and gathered[-1] is adapters[1]


def test_messages_that_are_not_printed_do_not_ask_for_the_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nvtx, "enable_nvtx", True)
    modules = (partition_parameters, partitioned_param_coordinator, stage3)
    for module in modules:
        monkeypatch.setattr(module, "print_rank_0", module.print_rank_0)
    gathers.trace_nothing()
    assert not nvtx.enable_nvtx
    ranks = iter([0, 1])
    monkeypatch.setattr(gathers.dist, "get_rank", lambda: next(ranks))
    for module in modules:
        module.print_rank_0("silent", force=False)
    stage3.print_rank_0("from the first rank", force=True)
    stage3.print_rank_0("from the second rank", force=True)
    assert capsys.readouterr().out == "from the first rank\n"


def test_devices_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []

    class Accelerator:
        def device_count(self) -> int:
            counted.append(1)
            return 3

    accelerator = Accelerator()
    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", lambda: accelerator)
    gathers.count_devices_once()
    assert [accelerator.device_count() for _ in range(3)] == [3, 3, 3]
    assert counted == [1]


def test_marks_of_the_backward_pass_read_no_signatures(monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[str] = []

    class Mark(torch.autograd.Function):  # in the style of DeepSpeed's
        @staticmethod
        def forward(output: torch.Tensor) -> torch.Tensor:
            return output.detach()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            passed.append("forward")

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
            passed.append("backward")
            return gradients

    module: Any = torch.nn.Linear(1, 1)
    module.pre_bwd_fn = Mark
    gathers.mark_backward_directly(torch.nn.Sequential(module))

    def signature(*_: object) -> None:
        raise AssertionError("a signature was read")

    monkeypatch.setattr("inspect.signature", signature)
    x = torch.ones(2, requires_grad=True)
    module.pre_bwd_fn.apply(x).sum().backward()
    assert passed == ["forward", "backward"] and x.grad is not None and x.grad.tolist() == [1.0, 1.0]
