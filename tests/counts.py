"""Counts what a GPU would do, on a machine without one: bytes moved, kernels launched, waits for the device.

Shared with benchmarks/.
"""

import sys
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten

# -- bytes and launches ----------------------------------------------------------------------------------------------

NARROW = 64
_PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "linear", "matmul")
_WITHOUT_KERNEL = (
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "alias",
    "lift_fresh",
)


class Traffic(TorchDispatchMode):
    """Inside, counts bytes and launches of every operation on the meta device, except views and allocations.

    An operation reads each of its tensors once and writes its results once; a broadcast tensor counts with the elements
    that it has. Launches of attention and wide matrix products are counted separately: `attention`, `products`.
    A product with a dimension of at most `NARROW`, such as an adapter's, moves bytes instead of computing: it counts
    like any other operation. What a wide product adds to is read within it: `bytes_added_to`, not part of `bytes`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.launches = 0
        self.products = 0
        self.bytes_added_to = 0
        self.attention = 0
        self.bytes_by_operation: Counter[str] = Counter()
        self.launches_by_operation: Counter[str] = Counter()
        self._whole = _FusedNorm(self)

    def __enter__(self) -> "Traffic":
        super().__enter__()
        self._whole.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._whole.__exit__(*error)
        super().__exit__(*error)

    def kernel(self, name: str, *tensors: torch.Tensor) -> None:
        """Count one launch that reads or writes each of `tensors` once."""
        moved = sum(_real_bytes(tensor) for tensor in tensors)
        self.bytes += moved
        self.launches += 1
        self.bytes_by_operation[name] += moved
        self.launches_by_operation[name] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if func.is_view or name in _WITHOUT_KERNEL or name == "_unsafe_view":
            return result
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if name in _PRODUCTS and min(size for tensor in inputs for size in tensor.shape) > NARROW:
            self.products += 1
            if name in ("addmm", "addmm_") and (kwargs or {}).get("beta", 1):
                self.bytes_added_to += _real_bytes(args[0])
        elif "attn" in name or "attention" in name:
            self.attention += 1
        else:
            # An operation in place reads and writes the same tensor: it stands in both lists.
            self.kernel(name, *_read(name, inputs), *outputs)
        return result


def _read(name: str, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """What an operation reads: a copy or a fill does not read what it overwrites."""
    return inputs[1:] if name in ("copy_", "fill_", "zero_") else inputs


def _real_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the elements that exist: a dimension of stride 0 repeats them."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= 1 if stride == 0 else size
    return elements * tensor.element_size()


class _FusedNorm(TorchFunctionMode):
    """Counts `F.rms_norm` as the kernels of a GPU: torch takes it to pieces on the meta device."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.rms_norm:
            return _CountedNorm.apply(args[0], (kwargs or {}).get("weight"), self.traffic)
        return func(*args, **(kwargs or {}))


class _CountedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, traffic: Traffic) -> torch.Tensor:
        rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
        result = torch.empty_like(x)
        traffic.kernel("_fused_rms_norm", x, weight, result, rstd)
        ctx.save_for_backward(x, weight, rstd)
        ctx.traffic = traffic
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        x, weight, rstd = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        ctx.traffic.kernel("_fused_rms_norm_backward", gradients[0], x, weight, rstd, grad_x)
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None
        grad_weight = torch.empty_like(weight)
        ctx.traffic.kernel("_fused_rms_norm_backward_weight", gradients[0], x, rstd, grad_weight)
        return grad_x, grad_weight, None


# -- host reads ------------------------------------------------------------------------------------------------------

_READING_FUNCTIONS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.__array__}
"""Functions that read a tensor of a CPU without any operation of torch."""
_READING_OPERATIONS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal"}


class HostReads(TorchDispatchMode):
    """Inside, records where the host would wait for the device: `places` has a line for each time.

    Counts reads of a tensor (`item`, `bool`, `tolist`, copies to the host, operations whose result has a size that the
    device knows first), and calls of the accelerator's `synchronize`. On a CPU any tensor could be on a device, except
    one that is made from Python numbers without a device, and what is computed from such tensors alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []
        self._on_host: set[int] = set()
        self._kept: list[torch.Tensor] = []  # so that no other tensor gets the same id
        self._functions = _ReadingFunctions(self)
        self._patches = ExitStack()

    def __enter__(self) -> "HostReads":
        super().__enter__()
        self._patches.enter_context(self._functions)
        if "deepspeed" in sys.modules:
            from deepspeed.accelerator import get_accelerator

            counted = mock.patch.object(type(get_accelerator()), "synchronize", self._synchronize)
            self._patches.enter_context(counted)
        return self

    def __exit__(self, *error: Any) -> None:
        self._patches.close()
        super().__exit__(*error)

    def _synchronize(self, *_: Any) -> None:
        self.record()

    def record(self) -> None:
        """Note the innermost line of code that is neither torch's nor this file's."""
        frames = traceback.extract_stack()
        own = [f for f in frames if "/torch/" not in f.filename and f.filename not in (__file__, mock.__file__)]
        self.places.append(f"{own[-1].filename}:{own[-1].lineno} {own[-1].line}")

    def is_on_host(self, tensor: Any) -> bool:
        return id(tensor) in self._on_host

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        from_host = all(self.is_on_host(tensor) for tensor in inputs)
        if name == "lift_fresh" or (inputs and from_host):
            outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            self._on_host.update(id(tensor) for tensor in outputs)
            self._kept += outputs
        elif name in _READING_OPERATIONS or (name.startswith("index") and _by_mask(args)):
            self.record()
        return result


def _by_mask(args: Any) -> bool:
    """Whether an indexing operation selects by a mask: how many elements that are, only the device knows."""
    return any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1:2]))


class _ReadingFunctions(TorchFunctionMode):
    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READING_FUNCTIONS and not self.reads.is_on_host(args[0]):
            self.reads.record()
        return func(*args, **(kwargs or {}))
