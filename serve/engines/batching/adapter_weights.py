"""An adapter's files become the tensors that the batched layers use. Knows peft's format; knows no registry.

Every tensor of the file must belong to a layer that the adapter's configuration names, and every such layer must have
its tensors: peft itself only warns, and then the base would answer in the adapter's name.

Legend: I input width, O output width, r rank, V vocabulary, D model width.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

from serve.engines.batching.packed_linear import PackedLinear

CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that change the base weights, so that the adapter means nothing on the base as it was published."""
UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
"""Settings of peft's LoRA that change what the adapter computes, in a way that the batched layers do not have."""
_PREFIX = "base_model.model."
_HEAD = "lm_head"

Kind = Literal["linear", "embedding", "norm"]


class UnsupportedAdapterError(Exception):
    """The adapter is none that can be batched with others. The text names the setting."""


class MisfitError(Exception):
    """The adapter's tensors are not those that its configuration needs on this base."""

    def __init__(self, mismatches: list[str]) -> None:
        super().__init__(*mismatches)
        self.mismatches = mismatches


class NonFiniteError(Exception):
    """A tensor contains NaN or infinity. The text names it."""


@dataclass(frozen=True)
class Site:
    """A layer of the base that an adapter may change."""

    name: str
    """Dotted, as in the base: ``model.layers.0.self_attn.q_proj``."""
    kind: Kind
    layer: nn.Module
    group: int = -1
    """Linear layers with the same input form a group."""
    member: int = 0
    """Place in the group."""

    @property
    def device(self) -> torch.device:
        device: torch.device = self.layer.weight.device  # type: ignore[assignment]
        return device

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs) of a linear layer, (V, D) of an embedding."""
        if isinstance(self.layer, (nn.Linear, PackedLinear)):  # a 4-bit layer's weight has a shape of its own
            return self.layer.out_features, self.layer.in_features
        rows, columns = self.layer.weight.shape  # type: ignore[misc]
        return int(rows), int(columns)

    @property
    def is_4bit(self) -> bool:
        return hasattr(self.layer.weight, "quant_state")

    def weight(self) -> torch.Tensor:
        """The base's weight; a 4-bit one is dequantised."""
        if isinstance(self.layer, PackedLinear):
            return self.layer.dense_weight()
        if not self.is_4bit:
            weight: torch.Tensor = self.layer.weight.data  # type: ignore[assignment]
            return weight
        from bitsandbytes.functional import dequantize_4bit

        packed: Any = self.layer.weight
        return dequantize_4bit(packed.data, packed.quant_state)


@dataclass(frozen=True, eq=False)
class GroupWeights:
    """The low-rank weights of one adapter for the linear layers of one group."""

    a_IR: torch.Tensor
    """A of all members side by side: R is the sum of their ranks."""
    columns: tuple[slice | None, ...]
    """Each member's columns of `a_IR`; None for one that the adapter leaves alone."""
    b_rO: tuple[torch.Tensor | None, ...]
    """B of each member, scaled; for DoRA also by magnitude / norm."""


@dataclass(frozen=True, eq=False)
class EmbeddingWeights:
    a_Vr: torch.Tensor
    b_rD: torch.Tensor
    """Scaled as in `GroupWeights`."""


@dataclass(frozen=True, eq=False)
class OwnWeights:
    """What the adapter uses instead of the base's weight (`modules_to_save`)."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """Weights of one adapter on the model's device. A sequence holds it from admission to its end."""

    id: str
    digest: str
    groups: Mapping[int, GroupWeights] = field(repr=False)
    embeddings: Mapping[str, EmbeddingWeights] = field(repr=False)
    factors: Mapping[str, torch.Tensor] = field(repr=False)
    """DoRA: magnitude / norm of the changed weight, one number for each output of a layer [O]."""
    biases: Mapping[str, torch.Tensor] = field(repr=False)
    """`lora_bias`, scaled [O]."""
    own: Mapping[str, OwnWeights] = field(repr=False)
    rank: int
    """The largest of its layers."""
    changes_head: bool
    """Whether the head computes something else than the base's."""

    @cached_property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors())

    def _tensors(self) -> Iterator[torch.Tensor]:
        for group in self.groups.values():
            yield group.a_IR
            yield from (b for b in group.b_rO if b is not None)
        for embedding in self.embeddings.values():
            yield embedding.a_Vr
            yield embedding.b_rD
        yield from self.factors.values()
        yield from self.biases.values()
        for own in self.own.values():
            yield own.weight
            if own.bias is not None:
                yield own.bias


def parse_config(content: bytes) -> LoraConfig:
    """The configuration of an adapter that can be batched. Raises `UnsupportedAdapterError`."""
    try:
        data = json.loads(content)
        peft_type = data.get("peft_type")
        if peft_type != "LORA":
            raise UnsupportedAdapterError(f"peft_type {peft_type}")
        known = {setting.name for setting in fields(LoraConfig)}
        if unknown := sorted(name for name, value in data.items() if name not in known and value):
            raise UnsupportedAdapterError(f"{unknown[0]}, which this version of peft does not have")
        config = LoraConfig(**{name: value for name, value in data.items() if name in known})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UnsupportedAdapterError(" ".join(str(error).split())) from None
    for setting in UNSUPPORTED:
        if getattr(config, setting, None):
            raise UnsupportedAdapterError(setting)
    return config


def changes_base(config: LoraConfig) -> bool:
    """Whether training began by changing the base (PiSSA and others), so that the adapter fits only the changed one."""
    return str(config.init_lora_weights).lower().startswith(CHANGES_BASE)


def change_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The type in which an adapter's change is computed, before it is added to the outputs of a base in `dtype`.

    On a CPU as in stock peft, which keeps adapters in fp32 (`autocast_adapter_dtype`). There it also costs less: a
    small product in bf16 takes two to three times as long as in fp32, for the setup of oneDNN's kernel.
    """
    return torch.float32 if device.type == "cpu" else dtype


def load_weights(
    adapter_id: str,
    digest: str,
    config: LoraConfig,
    tensors: Mapping[str, torch.Tensor],
    sites: Mapping[str, Site],
    dtype: torch.dtype,
) -> LoadedAdapter:
    """Check the tensors of an adapter's file against its configuration and the base, and lay them out for batching.

    `sites` are all layers of the base by name; the result is on their devices, in `dtype`, which is the base's, or in
    `change_dtype`. Raises `MisfitError`, `NonFiniteError`, and `UnsupportedAdapterError`.
    """
    expected, by_name = _checked(config, tensors, sites)
    loading = _Loading(config, by_name, sites, dtype)
    return loading.adapter(adapter_id, digest, expected)


def check_weights(config: LoraConfig, tensors: Mapping[str, torch.Tensor], sites: Mapping[str, Site]) -> None:
    """The checks of `load_weights` alone, for an engine that loads the files by itself."""
    _checked(config, tensors, sites)


@dataclass(frozen=True)
class _Expected:
    """What an adapter must bring, from its configuration."""

    ranks: dict[str, int]
    """Site -> rank, for all sites with low-rank weights."""
    own: list[str]
    """Sites with weights of their own."""
    shapes: dict[str, tuple[int, ...]]
    """Name of each tensor -> its shape."""


def _checked(
    config: LoraConfig, tensors: Mapping[str, torch.Tensor], sites: Mapping[str, Site]
) -> tuple[_Expected, dict[str, torch.Tensor]]:
    """What the adapter must bring, and its tensors by the name of their layer."""
    expected = _expected(config, sites)
    by_name = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    _check_names_and_shapes(expected, by_name, sites)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise NonFiniteError(name)
    return expected, by_name


def _expected(config: LoraConfig, sites: Mapping[str, Site]) -> _Expected:
    own = [name for name in sites if _is_saved_whole(config, name)]
    targets = [name for name, site in sites.items() if site.kind != "norm" and _is_target(config, name, site)]
    ranks = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in own:
        if sites[name].is_4bit:
            raise UnsupportedAdapterError(f"modules_to_save on {name}, which is quantised")
        site = sites[name]  # a packed weight may be that of several layers, and a norm's has one dimension
        shapes[f"{name}.weight"] = site.shape if site.kind == "linear" else tuple(site.layer.weight.shape)  # type: ignore[arg-type]
        if _bias(sites[name]) is not None:
            shapes[f"{name}.bias"] = (sites[name].shape[0],)
    for name in targets:
        rank = int(_patterned(config.rank_pattern, name, config.r))
        outputs, inputs = sites[name].shape
        ranks[name] = rank
        if sites[name].kind == "embedding":
            shapes[f"{name}.lora_embedding_A"] = (rank, outputs)
            shapes[f"{name}.lora_embedding_B"] = (inputs, rank)
            magnitudes = inputs
        else:
            shapes[f"{name}.lora_A.weight"] = (rank, inputs)
            shapes[f"{name}.lora_B.weight"] = (outputs, rank)
            if config.lora_bias:
                shapes[f"{name}.lora_B.bias"] = (outputs,)
            magnitudes = outputs
        if config.use_dora:
            shapes[f"{name}.lora_magnitude_vector"] = (magnitudes,)
    ends = ("embed_tokens", _HEAD)
    if config.ensure_weight_tying and any(name.endswith(ends) for name in (*own, *targets)):
        raise UnsupportedAdapterError("ensure_weight_tying")
    return _Expected(ranks, own, shapes)


def _is_target(config: LoraConfig, name: str, site: Site) -> bool:
    if config.target_modules == "all-linear":
        return site.kind == "linear" and not name.endswith(_HEAD)
    return bool(check_target_module_exists(config, name))


def _is_saved_whole(config: LoraConfig, name: str) -> bool:
    """peft saves a module whose name ends with an entry of `modules_to_save`, and everything below it."""
    parts = name.split(".")
    modules = [".".join(parts[: count + 1]) for count in range(len(parts))]
    return any(module.endswith(entry) for entry in config.modules_to_save or () for module in modules)


def _check_names_and_shapes(
    expected: _Expected, tensors: Mapping[str, torch.Tensor], sites: Mapping[str, Site]
) -> None:
    mismatches = [f"no tensor {name}" for name in expected.shapes if name not in tensors]
    for name, tensor in sorted(tensors.items()):
        if name in expected.shapes:
            if tuple(tensor.shape) != expected.shapes[name]:
                mismatches.append(f"{name} has shape {tuple(tensor.shape)} instead of {expected.shapes[name]}")
        elif not _is_copy_of_base(name, tensor, sites):
            mismatches.append(f"unexpected tensor {name}")
    if mismatches:
        raise MisfitError(mismatches)


def _is_copy_of_base(name: str, tensor: torch.Tensor, sites: Mapping[str, Site]) -> bool:
    """peft saves the whole layer beside its low-rank weights if that is an embedding or the head."""
    site = sites.get(name.removesuffix(".base_layer.weight"))
    if site is None or site.name == name or site.is_4bit:
        return False
    weight = site.weight()
    return tensor.shape == weight.shape and torch.equal(tensor.to(weight.device, weight.dtype), weight)


class _Loading:
    def __init__(
        self,
        config: LoraConfig,
        tensors: Mapping[str, torch.Tensor],
        sites: Mapping[str, Site],
        dtype: torch.dtype,
    ) -> None:
        self.config = config
        self.tensors = tensors
        self.sites = sites
        self.dtype = dtype
        self.factors: dict[str, torch.Tensor] = {}

    def adapter(self, adapter_id: str, digest: str, expected: _Expected) -> LoadedAdapter:
        targets = [self.sites[name] for name in expected.ranks]
        groups: dict[int, list[Site]] = {}
        for site in targets:
            if site.kind == "linear":
                groups.setdefault(site.group, []).append(site)
        sizes = {site.group: 0 for site in self.sites.values()}
        for site in self.sites.values():
            sizes[site.group] = max(sizes[site.group], site.member + 1)
        return LoadedAdapter(
            id=adapter_id,
            digest=digest,
            groups={group: self._group(members, sizes[group]) for group, members in groups.items()},
            embeddings={site.name: self._embedding(site) for site in targets if site.kind == "embedding"},
            biases={s.name: self._lora_bias(s) for s in targets if self.config.lora_bias and s.kind == "linear"},
            own={name: self._own(self.sites[name]) for name in expected.own},
            factors={name: self._moved(factor, self.sites[name]) for name, factor in self.factors.items()},
            rank=max(expected.ranks.values(), default=0),
            changes_head=any(name.endswith(_HEAD) for name in (*expected.ranks, *expected.own)),
        )

    def _group(self, members: list[Site], size: int) -> GroupWeights:
        a = []
        columns: list[slice | None] = [None] * size
        b: list[torch.Tensor | None] = [None] * size
        start = 0
        for site in members:
            a_rI = self.tensors[f"{site.name}.lora_A.weight"].to(site.device, torch.float32)
            b_Or = self.tensors[f"{site.name}.lora_B.weight"].to(site.device, torch.float32)
            scale = self._scale(site.name)
            if self.config.use_dora:
                factor_O = self._factor(site, torch.linalg.norm(site.weight().float() + scale * b_Or @ a_rI, dim=1))
                b_Or = b_Or * factor_O[:, None]
            a.append(a_rI.T)
            b[site.member] = self._moved(b_Or.T * scale, site)
            columns[site.member] = slice(start, start + len(a_rI))
            start += len(a_rI)
        return GroupWeights(self._moved(torch.cat(a, dim=1), members[0]), tuple(columns), tuple(b))

    def _embedding(self, site: Site) -> EmbeddingWeights:
        a_rV = self.tensors[f"{site.name}.lora_embedding_A"].to(site.device, torch.float32)
        b_Dr = self.tensors[f"{site.name}.lora_embedding_B"].to(site.device, torch.float32)
        scale = self._scale(site.name)
        if self.config.use_dora:  # peft's norm of an embedding runs over the vocabulary
            factor_D = self._factor(site, torch.linalg.norm(site.weight().float().T + scale * b_Dr @ a_rV, dim=1))
            b_Dr = b_Dr * factor_D[:, None]
        return EmbeddingWeights(self._moved(a_rV.T, site), self._moved(b_Dr.T * scale, site))

    def _factor(self, site: Site, norm: torch.Tensor) -> torch.Tensor:
        magnitude = self.tensors[f"{site.name}.lora_magnitude_vector"].to(site.device, torch.float32)
        factor = magnitude / norm
        if not factor.isfinite().all():
            raise NonFiniteError(f"{site.name}.lora_magnitude_vector, divided by the norm of the weight,")
        self.factors[site.name] = factor
        return factor

    def _lora_bias(self, site: Site) -> torch.Tensor:
        bias = self.tensors[f"{site.name}.lora_B.bias"].float()
        return self._moved(bias * self._scale(site.name), site)

    def _own(self, site: Site) -> OwnWeights:
        bias = self.tensors.get(f"{site.name}.bias")
        weight = self._copied(self.tensors[f"{site.name}.weight"], site, self.dtype)
        return OwnWeights(weight, None if bias is None else self._copied(bias, site, self.dtype))

    def _scale(self, name: str) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023, arXiv:2312.03732)."""
        config = self.config
        rank = _patterned(config.rank_pattern, name, config.r)
        alpha = _patterned(config.alpha_pattern, name, config.lora_alpha)
        return float(alpha / rank**0.5 if config.use_rslora else alpha / rank)

    def _moved(self, tensor: torch.Tensor, site: Site) -> torch.Tensor:
        return self._copied(tensor, site, change_dtype(site.device, self.dtype))

    @staticmethod
    def _copied(tensor: torch.Tensor, site: Site, dtype: torch.dtype) -> torch.Tensor:
        return tensor.to(site.device, dtype, copy=True).contiguous()


def _patterned(pattern: Mapping[str, float] | None, name: str, default: float) -> float:
    """The entry of `rank_pattern` or `alpha_pattern` for a layer."""
    pattern = pattern or {}
    return pattern.get(get_pattern_key(list(pattern), name), default)


def _bias(site: Site) -> torch.Tensor | None:
    bias: torch.Tensor | None = getattr(site.layer, "bias", None)
    return bias
