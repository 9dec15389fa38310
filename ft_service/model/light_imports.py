"""Start sooner: import torch, transformers and peft without those parts of them that this service never runs.

A process that trains or serves would spend more than half of its start on code that it does not call: torch's compiler
(`torch._dynamo`, `torch._inductor`, sympy), which transformers and bitsandbytes import; distributed tensors, FSDP and
flex attention, which transformers imports at its top; and bitsandbytes, which peft imports wherever it is installed.

`light_imports` is called explicitly, once, around the first import of these libraries in a process:

    with light_imports(four_bit=False):
        from ft_service.train.worker import run_worker

Traps
- It works only before transformers and peft are imported; afterwards it changes nothing but the collector.
- `four_bit` is decided once for a process. Without it, `import bitsandbytes` raises `ModuleNotFoundError` until the
  process ends, so that peft finds every layer to be an ordinary one. Loading 4-bit weights says so (`nf4`).
- Names that transformers takes from what is left out resolve at their first use. What it builds from them during the
  import (its own tensor-parallel plans) does not work in such a process: parallelism here is DeepSpeed's.
- Names of model families other than those below are no attributes of `transformers` in such a process. Their modules
  can be imported.
- torch's optimizers and `checkpoint` import the compiler only to be left out of what it compiles. Nothing is compiled
  in such a process, so they get their functions back unchanged. Whoever asks for more of `torch._dynamo` gets it.
"""

import gc
import importlib
import importlib.metadata
import operator
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

_COMPILER = "torch._dynamo"
_SYMBOLIC_SHAPES = "torch.fx.experimental.symbolic_shapes"
_LEFT_OUT = (
    "scipy.optimize",
    "sklearn.metrics",
    "torch._dynamo._trace_wrapped_higher_order_op",
    "torch.distributed._composable.fsdp",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.tensor._utils",
    "torch.distributed.tensor.placement_types",
)
"""What transformers 5.19 imports names from at its top, or while it loads a model: SciPy for detecting objects,
scikit-learn (where it is installed) for generating with a second, smaller model."""
_FAMILIES_FOLDER = os.path.join("transformers", "models")
_FAMILIES = frozenset({"auto", "bloom", "llama", "mllama"})
"""Those that this service loads, and bloom, whose name peft imports."""


@contextmanager
def light_imports(*, four_bit: bool) -> Iterator[None]:
    """Inside, the libraries are imported without their unused parts; `four_bit` keeps what 4-bit weights need."""
    with quick_imports():
        if four_bit or _are_imported():
            yield
        else:
            sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
            with _without_unused_parts():
                yield


@contextmanager
def quick_imports() -> Iterator[None]:
    """Inside, imports cost less and leave nothing out but the names of model families that this service does not load.

    For a process that needs no weights: a plan, a driver.
    """
    with _collector_at_rest(), _fewer_files_read():
        yield


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    """Inside, nobody looks for cycles of references; what was made is not looked at later either.

    An import makes many objects and hardly any garbage, and looking for some takes a fifth of its time.
    """
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_collecting:
            gc.enable()


@contextmanager
def _fewer_files_read() -> Iterator[None]:
    """Inside, transformers reads the names of a few model families, and nobody finds MLflow.

    transformers reads the source of all its 450 families (3,156 files) for the names that it offers, and the metadata
    of every installed package for the rare one whose name differs from that of its import. DeepSpeed's autotuner
    imports MLflow wherever it is installed.
    """
    scandir = os.scandir
    distributions = importlib.metadata.packages_distributions
    had_mlflow = "mlflow" in sys.modules

    def of_used_families(path: Any = ".") -> Any:
        if not os.fspath(path).endswith(_FAMILIES_FOLDER):
            return scandir(path)
        with scandir(path) as entries:
            return nullcontext([entry for entry in entries if entry.name in _FAMILIES or not entry.is_dir()])

    os.scandir = of_used_families
    importlib.metadata.packages_distributions = dict
    if not had_mlflow:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        os.scandir = scandir
        importlib.metadata.packages_distributions = distributions
        if not had_mlflow:
            del sys.modules["mlflow"]


@contextmanager
def plain_shapes() -> Iterator[None]:
    """Inside, torch computes shapes on the meta device without sympy, whose import takes 0.35 seconds.

    torch's meta kernels are Python, and ask of each size whether it is symbolic. Only a compiler makes such sizes, so
    this changes nothing in a process that has one. Whoever asks for more of these modules, or for the compiler, gets
    them.
    """
    if not isinstance(sys.modules.get(_COMPILER), _NoCompiler):
        yield
        return
    stand_ins = [module for module in _new_plain_modules() if module.__name__ not in sys.modules]
    sys.modules.update({module.__name__: module for module in stand_ins})
    try:
        yield
    finally:
        _remove_plain_modules()


class _PlainModule(ModuleType):
    """What meta kernels use of a module if no size is symbolic; the real one takes over once it is asked for more."""

    def __getattr__(self, name: str) -> Any:
        is_package = self.__name__ == "sympy"
        if name.startswith("__") and not (is_package and name == "__path__"):  # an import of a submodule asks for it
            raise AttributeError(name)
        _remove_plain_modules()
        return getattr(importlib.import_module(self.__name__), name)


def _new_plain_modules() -> list[_PlainModule]:
    algebra: Any = _PlainModule("sympy")
    algebra.Basic = type("Basic", (), {})  # nothing is an instance of it
    shapes: Any = _PlainModule(_SYMBOLIC_SHAPES)
    for condition in (
        "expect_true",
        "guard_or_false",
        "guard_or_true",
        "guard_size_oblivious",
        "statically_known_true",
    ):
        setattr(shapes, condition, bool)
    shapes.guarding_hint_or_throw = lambda size: size
    shapes.has_guarding_hint = lambda size: True
    shapes.is_nested_int = lambda size: False
    shapes.sym_and = lambda *conditions: all(conditions)
    shapes.sym_eq = operator.eq
    shapes.sym_or = lambda *conditions: any(conditions)
    return [algebra, shapes]


def _remove_plain_modules() -> None:
    for name in ("sympy", _SYMBOLIC_SHAPES):
        if isinstance(sys.modules.get(name), _PlainModule):
            del sys.modules[name]


def _are_imported() -> bool:
    return any(name in sys.modules for name in ("bitsandbytes", "peft", "transformers.modeling_utils", _COMPILER))


@contextmanager
def _without_unused_parts() -> Iterator[None]:
    import torch

    stand_ins = {module: _StandIn(module) for module in _LEFT_OUT if module not in sys.modules}
    sys.modules.update(stand_ins)
    compiler = sys.modules[_COMPILER] = _NoCompiler(torch)
    compile_ = torch.compile
    torch.compile = compiler.disable  # type: ignore[assignment]  # as a decorator it would import the compiler
    try:
        yield
    finally:
        torch.compile = compile_
        for module, stand_in in stand_ins.items():
            stand_in.is_importing = False
            if sys.modules.get(module) is stand_in:
                del sys.modules[module]
                parent, _, name = module.rpartition(".")
                if parent in sys.modules and name not in vars(sys.modules[parent]):
                    # peft reads torch.distributed.tensor without importing it. A real import replaces the attribute.
                    setattr(sys.modules[parent], name, stand_in)


class _StandIn(ModuleType):
    """A module whose names are resolved when they are used. Imports find it only while the libraries are imported."""

    is_importing = True

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked of any module, by imports and by whoever looks at all modules
            raise AttributeError(name)
        later = _Later(self, name)
        setattr(self, name, later)
        return later


class _Later:
    """A class or function of a module that is not imported before somebody calls it.

    An instance of such a class cannot exist before the module is imported, so `isinstance` needs not import it.
    """

    def __init__(self, module: _StandIn, name: str) -> None:
        self._module = module
        self._name = name

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if self._module.is_importing:
            return self
        return getattr(importlib.import_module(self._module.__name__), self._name)(*arguments, **options)

    def __instancecheck__(self, instance: object) -> bool:
        module = sys.modules.get(self._module.__name__)
        return module is not None and module is not self._module and isinstance(instance, getattr(module, self._name))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or self._module.is_importing:
            raise AttributeError(name)
        return getattr(getattr(importlib.import_module(self._module.__name__), self._name), name)

    def __or__(self, other: object) -> Any:
        return Any

    __ror__ = __or__


class _NoCompiler(ModuleType):
    """`torch._dynamo` of a process that compiles nothing; the real one takes its place once it is asked for more."""

    def __init__(self, torch: ModuleType) -> None:
        super().__init__(_COMPILER)
        self.__spec__ = find_spec(_COMPILER)
        self._torch = torch
        # What torch itself calls without anything to compile: each optimizer step, each new process group.
        self.graph_break = lambda *arguments, **options: None
        self.trace_rules = SimpleNamespace(clear_lru_cache=lambda: None)
        # `torch.utils.checkpoint` reads this setting in each forward pass.
        self.config = SimpleNamespace(error_on_nested_fx_trace=True)

    def disable(self, fn: Callable[..., Any] | None = None, *arguments: Any, **options: Any) -> Any:
        """`fn`, which nothing compiles anyway; without `fn`, a decorator that does the same."""
        return fn if fn is not None else lambda decorated: decorated

    assume_constant_result = allow_in_graph = disallow_in_graph = disable

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # which an import of a submodule asks for
            raise AttributeError(name)
        _remove_plain_modules()
        if sys.modules.get(_COMPILER) is self:
            del sys.modules[_COMPILER]
            if vars(self._torch).get("_dynamo") is self:
                delattr(self._torch, "_dynamo")
        return getattr(importlib.import_module(_COMPILER), name)
