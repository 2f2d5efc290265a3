"""One run of a model and all that it leaves behind: outputs, gradients, buffers, written inputs."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from conformance.case import Case
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_map

Observed = dict[str, Any]
_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_WIDE = {**dict.fromkeys(_NARROW, torch.float64), torch.complex64: torch.complex128}
_CASTS = {"float", "half", "bfloat16", "cfloat", "chalf"}


class Wide(TorchFunctionMode):
    """Runs a model in fp64 throughout: casts and factories that name a narrower type are widened."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ("view", "__get__"):  # a view as another dtype reads the bits
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(_wide_dtype, (args, kwargs or {}))
        if name in _CASTS and isinstance(args[0], torch.Tensor):
            return args[0].to(torch.complex128 if name.startswith("c") else torch.float64)
        return func(*args, **kwargs)


def _wide_dtype(value: Any) -> Any:
    return _WIDE.get(value, value) if isinstance(value, torch.dtype) else value


def drew_random_numbers() -> bool:
    """Whether the run just made took from the generator: then no fp64 run sees the same numbers."""
    after = torch.random.get_rng_state()
    seed()
    return not torch.equal(after, torch.random.get_rng_state())


def seed(value: int = 0) -> None:
    import numpy as np

    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value)


def observe(
    case: Case,
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]],
    *,
    train: bool,
    wide: bool = False,
    draw: int = 0,
) -> Observed:
    """Everything that one run of ``wrap(model)`` on copies of model and inputs leaves behind.

    ``draw`` seeds the random numbers of the run.
    """
    return Runs(wrap, train=train, wide=wide, draw=draw).run(case)


class Runs:
    """Runs of one model with other weights and inputs each time, wrapped (compiled) once."""

    def __init__(
        self,
        wrap: Callable[[Callable[..., Any]], Callable[..., Any]],
        *,
        train: bool,
        wide: bool = False,
        draw: int = 0,
    ) -> None:
        self.wrap, self.train, self.wide, self.draw = wrap, train, wide, draw
        self.model: Any = None
        self.function: Callable[..., Any] | None = None

    def run(self, case: Case) -> Observed:
        """Everything that a run on copies of the case's model and inputs leaves behind."""
        case = own(case)
        args, kwargs = tuple(case.args), dict(case.kwargs)
        if self.wide:
            args, kwargs = _widened((args, kwargs))
        model = self._take(case.model)
        inputs = dict(_named(("input", (args, kwargs))))
        _choose_gradients(inputs, model, self.train)
        if self.function is None:
            self.function = self.wrap(model if isinstance(model, nn.Module) else _plain(model))
        default = torch.get_default_dtype()
        seed(self.draw)
        try:
            with torch.set_grad_enabled(self.train):
                if self.wide:
                    torch.set_default_dtype(torch.float64)
                    with Wide():
                        result = self.function(*args, **kwargs)
                else:
                    result = self.function(*args, **kwargs)
        finally:
            torch.set_default_dtype(default)
        found: Observed = dict(_named(("output", result)))
        if self.train:
            backward(found)
            found.update({f"gradient of {n}": t.grad for n, t in inputs.items() if _has_grad(t)})
        if isinstance(model, nn.Module):
            if self.train:
                found.update({f"gradient of {n}": p.grad for n, p in model.named_parameters()})
            found.update({f"buffer {n}": b for n, b in model.named_buffers()})
        found.update({f"{n}, after": t for n, t in inputs.items()})
        return {name: _settled(value) for name, value in found.items()}

    def _take(self, model: Any) -> Any:
        """The model to run: the first one that came, with the weights and buffers of this one."""
        if not isinstance(model, nn.Module):
            self.function = None  # its tensors are in the closure, or among the inputs
            return model
        if self.model is None:
            self.model = model.train(self.train)
            if self.train:
                no_dropout(model)
            if self.wide:
                model.double()
            return model
        pairs = zip(_tensors(self.model), _tensors(model), strict=True)
        with torch.no_grad():
            for old, new in pairs:
                old.copy_(new)
        self.model.zero_grad(set_to_none=True)
        return self.model


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def own(case: Case) -> Case:
    """A copy of model and inputs together, so that what they share stays shared."""
    parts = (case.model, case.args, case.kwargs)
    compressed = [t for t in tree_leaves(parts) if isinstance(t, torch.Tensor) and _compressed(t)]
    memo: dict[int, Any] = {
        id(t): t.detach().clone().requires_grad_(t.requires_grad) for t in compressed
    }
    model, args, kwargs = copy.deepcopy(parts, memo)
    return replace(case, model=model, args=args, kwargs=kwargs)


def _compressed(value: torch.Tensor) -> bool:
    """Sparse with no storage that a deep copy could take."""
    return value.layout not in (torch.strided, torch.sparse_coo)


def backward(outputs: Observed) -> None:
    """Gradients of a sum of all float outputs with fixed random weights."""
    generator = torch.Generator().manual_seed(1)
    roots, weights = [], []
    for value in outputs.values():
        if not isinstance(value, torch.Tensor) or not value.requires_grad:
            continue
        if value.layout != torch.strided:
            value = value.to_dense()
        kind = torch.complex128 if value.is_complex() else torch.float64
        weight = torch.randn(value.shape, generator=generator, dtype=kind)
        roots.append(value)
        weights.append(weight.to(value.dtype).to(value.device))
    if roots:
        torch.autograd.backward(roots, weights)


def no_dropout(model: nn.Module) -> None:
    """Every probability of dropping something set to 0, in modules and in their configurations."""
    places: list[Any] = list(model.modules())
    places += [m.config for m in model.modules() if hasattr(m, "config")]
    for place in places:
        if isinstance(place, nn.modules.dropout._DropoutNd):
            place.p = 0.0
        for name, value in list(getattr(place, "__dict__", {}).items()):
            if "drop" in name and isinstance(value, float):
                setattr(place, name, 0.0)


def _choose_gradients(inputs: Observed, model: Any, train: bool) -> None:
    """Inputs that ask for gradients keep asking; where none does, a module's float inputs do."""
    tensors = [t for t in inputs.values() if isinstance(t, torch.Tensor)]
    if not train:
        for tensor in tensors:
            if tensor.is_leaf:
                tensor.requires_grad_(False)
    elif isinstance(model, nn.Module) and not any(t.requires_grad for t in tensors):
        for tensor in tensors:
            if tensor.is_leaf and (tensor.is_floating_point() or tensor.is_complex()):
                tensor.requires_grad_(True)


def _has_grad(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad and value.is_leaf


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """A Python function: torch.compile wants one, and most operators are builtins."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call


def _widened(tree: Any) -> Any:
    """Float tensors in fp64 (one for each original, so that tied inputs stay tied)."""
    done: dict[int, torch.Tensor] = {}

    def widen(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.dtype not in _WIDE:
            return _wide_dtype(leaf)
        if id(leaf) not in done:
            wide = leaf.detach().to(_WIDE[leaf.dtype]).requires_grad_(leaf.requires_grad)
            done[id(leaf)] = wide
        return done[id(leaf)]

    return tree_map(widen, tree)


def _named(root: tuple[str, Any]) -> Iterator[tuple[str, Any]]:
    """Leaves with their paths; plain objects (a cache) are looked into."""
    prefix, tree = root
    seen: set[int] = set()

    def walk(name: str, value: Any, depth: int) -> Iterator[tuple[str, Any]]:
        for path, leaf in tree_flatten_with_path(value)[0]:
            place = name + torch.utils._pytree.keystr(path)
            if isinstance(leaf, _SCALARS):
                yield place, leaf
            elif depth < 4 and id(leaf) not in seen and hasattr(leaf, "__dict__"):
                seen.add(id(leaf))
                yield from (
                    item
                    for key, inner in vars(leaf).items()
                    if any(_holds(i) for i in tree_leaves(inner))
                    for item in walk(f"{place}.{key}", inner, depth + 1)
                    if isinstance(item[1], torch.Tensor)
                )

    yield from walk(prefix, tree, 0)


_SCALARS = (torch.Tensor, int, float, complex, str, bool, torch.dtype, type(None))


def _holds(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or type(value).__module__.startswith("transformers")


def _settled(value: Any) -> Any:
    """A copy that later writes do not reach; dense, as the comparison wants it."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach()
    if value.layout != torch.strided:
        value = value.to_dense()
    if value.is_quantized:
        value = value.dequantize()
    return value.resolve_conj().resolve_neg().clone()
