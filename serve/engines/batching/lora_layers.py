"""Layers that add each row's own adapter, for a flattened batch in which rows belong to different adapters.

Two ways to compute x A B for all rows of a step, neither with a loop over adapters:

- *dense*: one product over the ranks of a few adapters side by side, for all rows from their first to their last; a
  mask then zeroes the ranks of other rows' adapters. Cost: rows x adapters. For runs of many rows (a prefill chunk),
  and for a single adapter.
- *padded*: the rows of each adapter, padded to the same number, as one batched product with stacked A and B.
  Cost: adapters x most rows of one. For many adapters with few rows each (decoding).

`set_rows` splits the runs of a step between the two by cost: an adapter may prefill by one and decode by the other.
Layers that share their input (q, k and v; gate and up) compute x A once for all.

Legend: N rows, S adapters in a stack, G rows of each, I input width, O output width, r rank, R ranks side by side,
D model width, V vocabulary.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from serve.engines.batching.adapter_weights import GroupWeights, LoadedAdapter, OwnWeights, Site, change_dtype
from serve.engines.batching.packed_linear import SHARED_INPUTS, PackedLinear
from serve.engines.batching.threads import threads_for

_HEAD = "lm_head"

# The unit of cost is a row times a rank. Measured on two CPU cores (Zen 4) with a model of width 384.
_FEWEST_ROWS = 4
"""A product of fewer rows takes no less time: reading the weights dominates."""
_LAUNCH = 300_000
"""What the launches of a dense product cost beside its arithmetic, times the model's width. A padded one has more."""
_PADDED_LAUNCHES = 1.7
_BUILD_ROWS = 90
"""Putting weights side by side costs as much as computing so many rows."""
_MOST_DENSE = 8
_KEPT_PLACES = 4
"""A padded stack of more places is freed when a single adapter is in use."""
_DENSE_STACKS = 2
"""Dense stacks of several adapters that are kept."""
_WANTED_STACKS = 4
"""Dense stacks that are not built yet, whose savings are counted."""


def install_lora_layers(model: LlamaForCausalLM) -> "BatchedLora":
    """Wrap the linear layers, norms, embedding and head of `model`, in place, so that they add each row's adapter.

    4-bit layers keep their layout: bitsandbytes would repack the weights of a CPU in the first forward pass, and DoRA
    has to read them later. Call it once.
    """
    return BatchedLora(model)


Run = tuple[LoadedAdapter | None, int]
"""So many consecutive rows belong to the adapter; None is the base."""


class BatchedLora:
    """Whose the rows of the next forward pass are. All calls come from the thread that owns the model."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.dtype = model.dtype
        self.sites: dict[str, Site] = {}
        self._body = _Rows()
        self._head = _Rows()
        self._groups: list[_Group] = []
        self._layers: dict[str, _BatchedLayer] = {}
        self._launch = _LAUNCH / model.config.hidden_size
        self._padded = _PaddedStack(self._groups)
        self._dense: dict[tuple[str, ...], _DenseStack] = {}
        self._missed: dict[tuple[str, ...], float] = {}
        """What dense stacks would have saved so far, had they been built."""
        self._width = model.config.hidden_size
        # What the layers hold at the moment; None if that is not known.
        self._vectors: tuple[LoadedAdapter, ...] | None = ()
        self._key: object = None
        self._bound: object = None
        self._wrap(model)

    @property
    def bytes_per_number(self) -> int:
        """At most, of a loaded adapter."""
        return max(change_dtype(site.device, self.dtype).itemsize for site in self.sites.values())

    @property
    def stack_bytes(self) -> int:
        """Memory of the stacks: copies of the weights of adapters in the batch."""
        dense = sum(stack.nbytes for stack in list(self._dense.values()))
        return self._padded.nbytes + dense + sum(layer.vector_bytes for layer in self._layers.values())

    @torch.inference_mode()
    def set_rows(
        self, adapters: Sequence[LoadedAdapter | None], token_rows: Sequence[int], logit_rows: Sequence[int]
    ) -> None:
        """Say whose the rows of the next forward pass are.

        The flattened batch consists of runs of rows; run i has ``token_rows[i]`` tokens and uses ``adapters[i]``. The
        head sees only the rows whose logits are needed: ``logit_rows[i]`` of run i, in the same order. The same
        adapter may have several runs.
        """
        key = (*adapters, *token_rows, *logit_rows)
        if key == self._key:
            return
        try:
            self._set_rows(adapters, token_rows, logit_rows)
        except BaseException:
            # Half of the layers may hold what the step before left there, and the same rows will be asked for again.
            self._forget()
            raise
        self._key = key

    def _set_rows(
        self, adapters: Sequence[LoadedAdapter | None], token_rows: Sequence[int], logit_rows: Sequence[int]
    ) -> None:
        used = [adapter for adapter in dict.fromkeys(adapters) if adapter is not None]
        body: list[Run] = list(zip(adapters, token_rows, strict=True))
        head: list[Run] = list(zip(adapters, logit_rows, strict=True))
        if not used:
            self._body.active = False
            self._head.active = False
            self._bind(None, None, ())
            return
        is_dense = self._split(body)
        dense = _adapters_of(body, is_dense)
        padded = _adapters_of(body, [not each for each in is_dense])
        if len(used) == 1 and self._padded.num_places > _KEPT_PLACES:
            self._padded.clear()
        places = self._padded.place(padded) if padded else {}
        stack = self._dense_stack(dense) if dense else None
        vectors = tuple(adapter for adapter in used if adapter.factors or adapter.biases)
        self._bind(stack, self._padded if padded else None, vectors)
        changes_head = any(adapter.changes_head for adapter in used)
        for rows, runs, active in ((self._body, body, True), (self._head, head, changes_head)):
            rows.active = active
            if active:
                rows.arrange(runs, is_dense, stack, places, self._padded, vectors)
                rows.multiplications = self._multiplications(runs, stack, len(places))
        with_own = [adapter for adapter in used if adapter.own or adapter.embeddings]
        for layer in self._layers.values():
            layer.set_own(with_own)

    def _multiplications(self, runs: Sequence[Run], dense: "_DenseStack | None", num_padded: int) -> int:
        """About those of the largest low-rank product of a layer."""
        ranks = dense.rank * len(dense.digests) if dense else 0
        if num_padded:
            ranks = max(ranks, self._padded.rank)
        return sum(count for _, count in runs) * ranks * self._width

    def _forget(self) -> None:
        self._key = None
        self._bound = None
        self._vectors = None
        self._padded.clear()
        self._dense.clear()

    # -- installing ------------------------------------------------------------------------------------------------

    def _wrap(self, model: LlamaForCausalLM) -> None:
        for parent_name, parent in list(model.named_modules()):
            children = {name: layer for name, layer in parent.named_children() if _kind(layer) is not None}
            for name, layer in children.items():
                full = f"{parent_name}.{name}" if parent_name else name
                kind = _kind(layer)
                assert kind is not None
                rows = self._head if name == _HEAD else self._body
                if kind != "linear":
                    site = Site(full, kind, layer)
                    self.sites[full] = site
                    wrapper = BatchedEmbedding if kind == "embedding" else BatchedNorm
                    self._layers[full] = wrapper(site, rows)
                    setattr(parent, name, self._layers[full])
                    continue
                if hasattr(layer, "support_avx512bf16_for_cpu"):
                    layer.support_avx512bf16_for_cpu = False
                sharing = next((names for names in SHARED_INPUTS if name in names), (name,))
                if name == next(shared for shared in sharing if shared in children):
                    self._groups.append(_Group(len(self._groups), rows))
                group = self._groups[-1]
                site = Site(full, "linear", layer, group.index, len(group.members))
                self.sites[full] = site
                linear = BatchedLinear(site, rows, group)
                group.members.append(linear)
                self._layers[full] = linear
                setattr(parent, name, linear)

    # -- a step ----------------------------------------------------------------------------------------------------

    def _split(self, runs: Sequence[Run]) -> list[bool]:
        """Which runs are for the dense product, such that the step costs least. Those of the base are for neither."""
        with_weights = [index for index, (adapter, _) in enumerate(runs) if adapter is not None and adapter.groups]
        if len({runs[index][0] for index in with_weights}) <= 1:
            return [True] * len(runs)
        order = sorted(with_weights, key=lambda index: -_work(runs[index]))
        sets = [frozenset(order[:count]) for count in range(min(len(order), _MOST_DENSE) + 1)]
        costs = [self._cost(runs, dense, with_weights) for dense in sets]
        cheapest_now = min(range(len(sets)), key=lambda index: sum(costs[index]))
        cheapest = min(range(len(sets)), key=lambda index: costs[index][0])
        chosen = cheapest_now
        if costs[cheapest][1] and cheapest != cheapest_now:
            wanted = _adapters_of(runs, [index in sets[cheapest] for index in range(len(runs))])
            saved = sum(costs[cheapest_now]) - costs[cheapest][0]
            if self._is_worth_building(_digests(wanted), saved, costs[cheapest][1]):
                chosen = cheapest
        return [index in sets[chosen] for index in range(len(runs))]

    def _is_worth_building(self, wanted: tuple[str, ...], saved: float, build: float) -> bool:
        """Whether all steps so far would have saved what a dense stack of these adapters costs to build."""
        missed = self._missed.pop(wanted, 0.0) + saved
        if missed >= build:
            return True
        self._missed[wanted] = missed
        while len(self._missed) > _WANTED_STACKS:
            self._missed.pop(next(iter(self._missed)))
        return False

    def _cost(self, runs: Sequence[Run], dense: frozenset[int], with_weights: Sequence[int]) -> tuple[float, float]:
        """Of a step, and of building the dense stack before it."""
        cost = 0.0
        build = 0.0
        in_dense = _adapters_of(runs, [index in dense for index in range(len(runs))])
        if in_dense:
            ranks = len(in_dense) * max(adapter.rank for adapter in in_dense)
            cost += self._launch + ranks * sum(runs[index][1] for index in dense)
            if len(in_dense) > 1 and _digests(in_dense) not in self._dense:
                build = float(_BUILD_ROWS * ranks)
        rows: dict[LoadedAdapter, int] = {}
        for index in with_weights:
            adapter, count = runs[index]
            if index not in dense and adapter is not None:
                rows[adapter] = rows.get(adapter, 0) + count
        if rows:
            most_rows = max(_FEWEST_ROWS, *rows.values())
            cost += self._launch * _PADDED_LAUNCHES
            cost += len(rows) * most_rows * max(adapter.rank for adapter in rows)
        return cost, build

    def _dense_stack(self, adapters: tuple[LoadedAdapter, ...]) -> "_DenseStack":
        if len(adapters) == 1:
            return _DenseStack(self._groups, adapters)
        key = _digests(adapters)
        stack = self._dense.pop(key, None) or _DenseStack(self._groups, adapters)
        self._dense[key] = stack
        while len(self._dense) > _DENSE_STACKS:
            self._dense.pop(next(iter(self._dense)))
        return stack

    def _bind(
        self, dense: "_DenseStack | None", padded: "_PaddedStack | None", vectors: tuple[LoadedAdapter, ...]
    ) -> None:
        bound = (dense and dense.key, padded and (padded.version, padded.num_used), vectors)
        if bound == self._bound:
            return
        self._bound = bound
        for group in self._groups:
            group.bind(dense, padded)
        if vectors != self._vectors:
            self._vectors = vectors
            for layer in self._layers.values():
                layer.bind_vectors(vectors)


def _work(run: Run) -> int:
    adapter, count = run
    return max(count, _FEWEST_ROWS) * (adapter.rank if adapter else 0)


def _adapters_of(runs: Sequence[Run], are_chosen: Sequence[bool]) -> tuple[LoadedAdapter, ...]:
    """Those with low-rank weights of linear layers, in one order whatever the runs are: a stack is found again."""
    chosen = [adapter for (adapter, _), is_chosen in zip(runs, are_chosen, strict=True) if is_chosen]
    with_weights = {adapter for adapter in chosen if adapter is not None and adapter.groups}
    return tuple(sorted(with_weights, key=lambda adapter: adapter.digest))


def _kind(layer: nn.Module) -> Any:
    if isinstance(layer, (nn.Linear, PackedLinear)):
        return "linear"
    if isinstance(layer, nn.Embedding):
        return "embedding"
    return "norm" if isinstance(layer, LlamaRMSNorm) else None


def _digests(adapters: Iterable[LoadedAdapter]) -> tuple[str, ...]:
    return tuple(adapter.digest for adapter in adapters)


# -- weights side by side --------------------------------------------------------------------------------------------


class _DenseStack:
    """The ranks of a few adapters side by side: columns of A member by member, within it adapter by adapter.

    Of a single adapter, its own tensors. Of several, copies padded with zeros to the same rank.
    """

    def __init__(self, groups: "Sequence[_Group]", adapters: tuple[LoadedAdapter, ...]) -> None:
        self.key = adapters if len(adapters) == 1 else _digests(adapters)
        self.digests = _digests(adapters)
        self.rank = max(adapter.rank for adapter in adapters)
        self.weights: dict[int, GroupWeights] = {}
        if len(adapters) == 1:
            self.weights = dict(adapters[0].groups)
            return
        for group in groups:
            parts = [adapter.groups.get(group.index) for adapter in adapters]
            if any(part is not None for part in parts):
                self.weights[group.index] = _side_by_side(group, parts, self.rank)

    @property
    def nbytes(self) -> int:
        return sum(
            weights.a_IR.nbytes + sum(b.nbytes for b in weights.b_rO if b is not None)
            for weights in self.weights.values()
        )


def _side_by_side(group: "_Group", parts: Sequence[GroupWeights | None], rank: int) -> GroupWeights:
    some = next(part for part in parts if part is not None)
    num_members = len(group.members)
    used = [any(part is not None and part.b_rO[member] is not None for part in parts) for member in range(num_members)]
    width = rank * len(parts)
    a_IR = some.a_IR.new_zeros(some.a_IR.shape[0], width * num_members)
    b_rO = [
        a_IR.new_zeros(width, linear.site.shape[0]) if used[member] else None
        for member, linear in enumerate(group.members)
    ]
    for number, part in enumerate(parts):
        if part is None:
            continue
        for member, (columns, b) in enumerate(zip(part.columns, part.b_rO, strict=True)):
            target = b_rO[member]
            if columns is None or b is None or target is None:
                continue
            start = member * width + number * rank
            a_IR[:, start : start + len(b)] = part.a_IR[:, columns]
            target[number * rank : number * rank + len(b)] = b
    side_by_side = tuple(slice(member * width, (member + 1) * width) for member in range(num_members))
    return GroupWeights(a_IR, side_by_side, tuple(b_rO))


class _PaddedStack:
    """A and B of many adapters, stacked and padded with zeros to the same rank.

    An adapter keeps its place while it is in use, and as long as nobody else needs the place: then one that joins costs
    a copy of its own weights only.
    """

    def __init__(self, groups: "Sequence[_Group]") -> None:
        self._groups = groups
        self._digests: list[str | None] = []
        self.rank = 0
        self.a_SIR: dict[int, torch.Tensor] = {}
        self.b_SrO: dict[tuple[int, int], torch.Tensor] = {}
        self.num_used = 0
        """Places from here on hold no adapter of this step."""
        self.version = 0

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*list(self.a_SIR.values()), *list(self.b_SrO.values())))

    @property
    def num_places(self) -> int:
        return len(self._digests)

    def clear(self) -> None:
        """Free the memory."""
        self.a_SIR.clear()
        self.b_SrO.clear()
        self._digests.clear()

    def place(self, adapters: Sequence[LoadedAdapter]) -> dict[LoadedAdapter, int]:
        """Make room for these adapters; returns their places."""
        needed = set(_digests(adapters))
        places = {digest: place for place, digest in enumerate(self._digests) if digest in needed}
        missing = [adapter for adapter in adapters if adapter.digest not in places]
        free = [place for place, digest in enumerate(self._digests) if digest not in needed]
        last = max([*places.values(), *free[: len(missing)]], default=0)
        rank = max(adapter.rank for adapter in adapters)
        is_sparse = last >= 2 * len(adapters) or self.rank >= 2 * rank
        if len(free) < len(missing) or rank > self.rank or is_sparse or not all(map(self._has_room, missing)):
            return self._rebuild(adapters, rank)
        for adapter, place in zip(missing, free, strict=False):
            self._write(adapter, place, is_new=False)
            places[adapter.digest] = place
        self.num_used = 1 + max(places.values())
        return {adapter: places[adapter.digest] for adapter in adapters}

    def _has_room(self, adapter: LoadedAdapter) -> bool:
        return all(
            b is None or (index, member) in self.b_SrO
            for index, weights in adapter.groups.items()
            for member, b in enumerate(weights.b_rO)
        )

    def _rebuild(self, adapters: Sequence[LoadedAdapter], rank: int) -> dict[LoadedAdapter, int]:
        num_places = 1 << (len(adapters) - 1).bit_length()
        self.version += 1
        self.rank = rank
        self.clear()  # before the new ones are allocated
        self._digests = [None] * num_places
        for index, group in enumerate(self._groups):
            parts = [adapter.groups[index] for adapter in adapters if index in adapter.groups]
            if not parts:
                continue
            a = parts[0].a_IR
            self.a_SIR[index] = a.new_zeros(num_places, a.shape[0], len(group.members) * rank)
            for member, linear in enumerate(group.members):
                if any(part.b_rO[member] is not None for part in parts):
                    self.b_SrO[index, member] = a.new_zeros(num_places, rank, linear.site.shape[0])
        for place, adapter in enumerate(adapters):
            self._write(adapter, place, is_new=True)
        self.num_used = len(adapters)
        return {adapter: place for place, adapter in enumerate(adapters)}

    def _write(self, adapter: LoadedAdapter, place: int, *, is_new: bool) -> None:
        if not is_new and self._digests[place] is not None:
            for tensor in (*self.a_SIR.values(), *self.b_SrO.values()):
                tensor[place].zero_()
        self._digests[place] = adapter.digest
        for index, weights in adapter.groups.items():
            for member, (columns, b) in enumerate(zip(weights.columns, weights.b_rO, strict=True)):
                if columns is not None and b is not None:
                    start = member * self.rank
                    self.a_SIR[index][place, :, start : start + len(b)] = weights.a_IR[:, columns]
                    self.b_SrO[index, member][place, : len(b)] = b


# -- rows of a step --------------------------------------------------------------------------------------------------


class _Rows:
    """Which adapter each row of the flattened batch uses, as the products need it."""

    def __init__(self) -> None:
        self.active = False
        """Whether any row uses an adapter. Without one, a layer asks nothing but this."""
        self.multiplications = 0
        """About those of the largest low-rank product of a layer."""
        self.by_adapter: dict[LoadedAdapter, torch.Tensor] = {}
        """Row numbers, of adapters that have weights of their own or a changed embedding."""
        self._make: Callable[[torch.device], _RowTensors] | None = None
        self._on: dict[torch.device, _RowTensors] = {}

    def on(self, device: torch.device) -> "_RowTensors":
        """The rows' tensors on a device. They are moved there once a step, where the layers of a model are spread."""
        tensors = self._on.get(device)
        if tensors is None:
            assert self._make is not None
            tensors = self._on[device] = self._make(device)
        return tensors

    def arrange(
        self,
        runs: Sequence[Run],
        is_dense: Sequence[bool],
        dense: _DenseStack | None,
        places: Mapping[LoadedAdapter, int],
        padded: _PaddedStack,
        vectors: Sequence[LoadedAdapter],
    ) -> None:
        self._on.clear()
        self.by_adapter = _rows_by_adapter(runs)
        layout = _Layout(runs, is_dense, dense, places, padded.num_used, vectors)
        self._make = lambda device: _RowTensors(layout, device)


class _Layout:
    """Python numbers from which `_RowTensors` are made."""

    def __init__(
        self,
        runs: Sequence[Run],
        is_dense: Sequence[bool],
        dense: _DenseStack | None,
        places: Mapping[LoadedAdapter, int],
        num_places: int,
        vectors: Sequence[LoadedAdapter],
    ) -> None:
        self.num_dense = len(dense.digests) if dense else 0
        self.dense_rank = dense.rank if dense else 0
        self.num_places = num_places if places else 0
        counts: dict[LoadedAdapter, int] = {}
        for (adapter, count), in_dense in zip(runs, is_dense, strict=True):
            if adapter in places and not in_dense:
                assert adapter is not None
                counts[adapter] = counts.get(adapter, 0) + count
        self.most_rows = max(counts.values(), default=0)
        dense_numbers: list[int] = []  # for each row: its adapter in the dense stack, -1 for another one
        self.owners: list[int] = []  # for each row: its adapter in `vectors`, or their number
        self.sources = [0] * (self.num_places * self.most_rows)  # place in the padded batch -> row
        self.padded_rows: list[int] = []
        self.targets: list[int] = []  # of each padded row: its place in the padded batch
        numbers = {digest: number for number, digest in enumerate(dense.digests)} if dense else {}
        filled: dict[LoadedAdapter, int] = {}
        row = 0
        for (adapter, count), in_dense in zip(runs, is_dense, strict=True):
            dense_numbers += [numbers.get(adapter.digest, -1) if adapter and in_dense else -1] * count
            self.owners += [vectors.index(adapter) if adapter in vectors else len(vectors)] * count
            if adapter is not None and adapter in places and not in_dense:
                start = places[adapter] * self.most_rows + filled.get(adapter, 0)
                filled[adapter] = filled.get(adapter, 0) + count
                rows = range(row, row + count)
                self.sources[start : start + count] = rows
                self.padded_rows += rows
                self.targets += range(start, start + count)
            row += count
        self.dense_rows = _range_of([row for row, number in enumerate(dense_numbers) if number >= 0])
        self.dense_numbers = dense_numbers[self.dense_rows]


def _range_of(rows: Sequence[int]) -> slice:
    """From the first to the last of rows in order."""
    return slice(rows[0], rows[-1] + 1) if rows else slice(0, 0)


class _RowTensors:
    def __init__(self, layout: _Layout, device: torch.device) -> None:
        self._layout = layout
        self._device = device
        self._of_others: dict[int, torch.Tensor | None] = {}
        self.shape = (layout.num_places, layout.most_rows)
        self.sources = self._indices(layout.sources)
        self.targets = self._indices(layout.targets)
        self.dense_rows = layout.dense_rows
        """Between these, all rows of the dense product are."""
        rows = _range_of(layout.padded_rows)
        are_neighbours = len(layout.padded_rows) == rows.stop - rows.start
        self.padded_rows = rows if are_neighbours else self._indices(layout.padded_rows)
        self.owners = self._indices(layout.owners)

    def _indices(self, numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64).to(self._device, non_blocking=True)

    def of_others(self, num_members: int) -> torch.Tensor | None:
        """Which columns of x A belong to other rows' adapters, bool [rows, 1] or [rows, R]; None if none do."""
        if num_members not in self._of_others:
            self._of_others[num_members] = self._find_others(num_members)
        return self._of_others[num_members]

    def _find_others(self, num_members: int) -> torch.Tensor | None:
        layout = self._layout
        if layout.num_dense == 1 and all(number == 0 for number in layout.dense_numbers):
            return None
        numbers = self._indices(layout.dense_numbers)
        others = numbers[:, None] != torch.arange(layout.num_dense, device=self._device)
        if layout.num_dense == 1:
            return others
        return others.repeat_interleave(layout.dense_rank, 1).repeat(1, num_members)


def _rows_by_adapter(runs: Sequence[Run]) -> dict[LoadedAdapter, torch.Tensor]:
    rows: dict[LoadedAdapter, list[int]] = {}
    start = 0
    for adapter, count in runs:
        if adapter is not None and (adapter.own or adapter.embeddings):
            rows.setdefault(adapter, []).extend(range(start, start + count))
        start += count
    return {adapter: torch.tensor(numbers, dtype=torch.int64) for adapter, numbers in rows.items()}


# -- layers ----------------------------------------------------------------------------------------------------------


class _Group:
    """Linear layers with the same input: x A is computed when the first of them is called."""

    def __init__(self, index: int, rows: _Rows) -> None:
        self.index = index
        self.rows = rows
        self.members: list[BatchedLinear] = []
        self._dense_a: torch.Tensor | None = None
        self._padded_a: torch.Tensor | None = None
        self._last: BatchedLinear | None = None
        self._x: torch.Tensor | None = None
        self.dense: torch.Tensor | None = None
        """x A for the dense product, masked [rows from its first to its last, R]."""
        self.padded: torch.Tensor | None = None
        """x A for the padded product [S, G, R]."""

    def bind(self, dense: _DenseStack | None, padded: _PaddedStack | None) -> None:
        """Use these stacks from now on."""
        side_by_side = dense.weights.get(self.index) if dense else None
        self._dense_a = None if side_by_side is None else side_by_side.a_IR
        stacked = padded.a_SIR.get(self.index) if padded else None
        self._padded_a = None if stacked is None or padded is None else stacked[: padded.num_used]
        self._last = None
        for member, linear in enumerate(self.members):
            linear.dense_b = None if side_by_side is None else side_by_side.b_rO[member]
            linear.dense_columns = None if side_by_side is None else side_by_side.columns[member]
            stacked = padded.b_SrO.get((self.index, member)) if padded else None
            linear.padded_b = None if stacked is None or padded is None else stacked[: padded.num_used]
            if padded is not None:
                linear.padded_columns = slice(member * padded.rank, (member + 1) * padded.rank)
            if linear.dense_b is not None or linear.padded_b is not None:
                self._last = linear

    def project(self, x: torch.Tensor, member: "BatchedLinear") -> None:
        """Compute x A for all members, unless it was done for this very `x`."""
        if self._x is not x:
            self._x = x
            x_NI = x.reshape(-1, x.shape[-1]).to(change_dtype(x.device, x.dtype))
            rows = self.rows.on(x.device)
            if self._dense_a is not None:
                self.dense = x_NI[rows.dense_rows] @ self._dense_a
                others = rows.of_others(len(self.members))
                if others is not None:
                    # Not a product with 0: what overflows in one adapter would make the rows of all others NaN.
                    self.dense.masked_fill_(others, 0)
            if self._padded_a is not None:
                x_SGI = x_NI.index_select(0, rows.sources).view(*rows.shape, x_NI.shape[-1])
                self.padded = torch.bmm(x_SGI, self._padded_a)

    def done(self, member: "BatchedLinear") -> None:
        """Free what was kept for the other members, once the last has been called."""
        if member is self._last:
            self._x = self.dense = self.padded = None


class _BatchedLayer(nn.Module):
    """A layer of the base that adds what the adapters of its rows change."""

    def __init__(self, site: Site, rows: _Rows) -> None:
        super().__init__()
        self.base = site.layer
        self.site = site
        self.rows = rows
        self._own: list[tuple[LoadedAdapter, OwnWeights]] = []
        self._factors: torch.Tensor | None = None
        self._biases: torch.Tensor | None = None

    @property
    def weight(self) -> torch.Tensor:
        """The base's."""
        weight: torch.Tensor = self.base.weight  # type: ignore[assignment]
        return weight

    @property
    def vector_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self._factors, self._biases) if tensor is not None)

    def set_own(self, adapters: Sequence[LoadedAdapter]) -> None:
        """Adapters of this step that may use weights of their own here (`modules_to_save`)."""
        name = self.site.name
        self._own = [(adapter, adapter.own[name]) for adapter in adapters if name in adapter.own]

    def bind_vectors(self, adapters: Sequence[LoadedAdapter]) -> None:
        """Stack what these adapters multiply and add to each output; the last row is for all others."""
        self._factors = self._stacked([adapter.factors.get(self.site.name) for adapter in adapters], 1.0)
        self._biases = self._stacked([adapter.biases.get(self.site.name) for adapter in adapters], 0.0)

    @staticmethod
    def _stacked(vectors: Sequence[torch.Tensor | None], neutral: float) -> torch.Tensor | None:
        some = next((vector for vector in vectors if vector is not None), None)
        if some is None:
            return None
        other = torch.full_like(some, neutral)
        return torch.stack([*(other if vector is None else vector for vector in vectors), other])

    def _apply_own(self, x: torch.Tensor, y_NO: torch.Tensor) -> None:
        """One product for each adapter: their weights are as large as the base's and share nothing."""
        for adapter, own in self._own:
            rows = self.rows.by_adapter[adapter].to(y_NO.device)
            y_NO.index_copy_(0, rows, self._with(x.index_select(0, rows), own))

    def _with(self, x: torch.Tensor, own: OwnWeights) -> torch.Tensor:
        raise NotImplementedError

    def _apply_vectors(self, y_NO: torch.Tensor) -> None:
        owners = self.rows.on(y_NO.device).owners
        if self._factors is not None:
            bias = getattr(self.base, "bias", None)
            if bias is not None:  # DoRA scales the product, not the bias
                y_NO -= bias
            y_NO *= self._factors.index_select(0, owners)
            if bias is not None:
                y_NO += bias
        if self._biases is not None:
            y_NO += self._biases.index_select(0, owners)


class BatchedLinear(_BatchedLayer):
    """y = x W^T, plus x A B of each row's adapter; [1, N, I] -> [1, N, O]."""

    def __init__(self, site: Site, rows: _Rows, group: _Group) -> None:
        super().__init__(site, rows)
        self._group = group
        self.dense_b: torch.Tensor | None = None
        self.dense_columns: slice | None = None
        self.padded_b: torch.Tensor | None = None
        self.padded_columns = slice(0, 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x)
        if self.rows.active:
            self._add(x, y.view(-1, y.shape[-1]))
        return y

    def _add(self, x: torch.Tensor, y_NO: torch.Tensor) -> None:
        if self._own:
            self._apply_own(x.reshape(-1, x.shape[-1]), y_NO)
        if self._factors is not None or self._biases is not None:
            self._apply_vectors(y_NO)
        if self.dense_b is None and self.padded_b is None:
            return
        with threads_for(self.rows.multiplications, x.device):
            self._add_products(x, y_NO)

    def _add_products(self, x: torch.Tensor, y_NO: torch.Tensor) -> None:
        group = self._group
        group.project(x, self)
        rows = self.rows.on(x.device)
        if self.dense_b is not None:
            assert group.dense is not None
            dense_NR = group.dense[:, self.dense_columns]
            if y_NO.dtype == dense_NR.dtype:
                y_NO[rows.dense_rows].addmm_(dense_NR, self.dense_b)
            else:
                y_NO[rows.dense_rows].add_(dense_NR @ self.dense_b)
        if self.padded_b is not None:
            assert group.padded is not None
            change_SGO = torch.bmm(group.padded[:, :, self.padded_columns], self.padded_b)
            change_NO = change_SGO.view(-1, y_NO.shape[-1]).index_select(0, rows.targets)
            if isinstance(rows.padded_rows, slice):
                y_NO[rows.padded_rows].add_(change_NO)
            else:  # `index_add_` takes one dtype only
                y_NO.index_copy_(0, rows.padded_rows, y_NO.index_select(0, rows.padded_rows).add_(change_NO))
        group.done(self)

    def _with(self, x: torch.Tensor, own: OwnWeights) -> torch.Tensor:
        return F.linear(x, own.weight, own.bias)


class BatchedEmbedding(_BatchedLayer):
    """Rows of a table, of each row's adapter; [1, N] -> [1, N, D]. A small product for each adapter that changes it."""

    def __init__(self, site: Site, rows: _Rows) -> None:
        super().__init__(site, rows)
        self._changed: list[LoadedAdapter] = []

    def set_own(self, adapters: Sequence[LoadedAdapter]) -> None:
        super().set_own(adapters)
        self._changed = [adapter for adapter in adapters if self.site.name in adapter.embeddings]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(ids)
        if self.rows.active and (self._own or self._changed):
            self._add(ids.view(-1), y.view(-1, y.shape[-1]))
        return y

    def _add(self, ids_N: torch.Tensor, y_ND: torch.Tensor) -> None:
        self._apply_own(ids_N, y_ND)
        self._apply_vectors(y_ND)
        for adapter in self._changed:
            embedding = adapter.embeddings[self.site.name]
            rows = self.rows.by_adapter[adapter].to(y_ND.device)
            change = F.embedding(ids_N.index_select(0, rows), embedding.a_Vr) @ embedding.b_rD
            y_ND.index_add_(0, rows, change.to(y_ND.dtype))

    def _with(self, x: torch.Tensor, own: OwnWeights) -> torch.Tensor:
        return F.embedding(x, own.weight)


class BatchedNorm(_BatchedLayer):
    """RMS norm, scaled by the weight of each row's adapter; [1, N, D] -> [1, N, D]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x)
        if self.rows.active and self._own:
            self._apply_own(x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1]))
        return y

    def _with(self, x: torch.Tensor, own: OwnWeights) -> torch.Tensor:
        norm: Any = self.base
        x_fp32 = x.float()
        x_fp32 = x_fp32 * torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
        return own.weight * x_fp32.to(x.dtype)
