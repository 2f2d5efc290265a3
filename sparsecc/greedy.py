"""TEAL's greedy search: which layers of a block bear more sparsity than others.

Law     every p_i of a block starts at 0; of all layers that one rises by its step whose rise leaves the block's
        output nearest to what it was, ‖Y − Ŷ‖₂, until Σ p_i size_i = p Σ size_i.
Source  Liu et al. 2024, "TEAL" (arXiv:2408.14690), alg. 1. The step of a layer is 0.05 / (its size, relative to
        the largest of the block), so that every rise spares as many bytes; the last rise is cut to end at p.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_map

from sparsecc.errors import CalibrationError
from sparsecc.methods.common import not_skipped
from sparsecc.networks import first_tensor, outermost
from sparsecc.observations import Observations
from sparsecc.observe import arguments
from sparsecc.recipe import Recipe
from sparsecc.simulate_sparse import SparseSimulation, simulated_sparse
from sparsecc.statistics import Statistics

ROWS = 512  # of a block, at most, but always one call
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class _Block:
    """One block and its way so far.

    Attributes:
        calls: what it is run on.
        sizes: site -> the numbers in its weight.
        shares: site -> p_i after all rises of ``path``.
        path: the rises in order: site, p_i behind it.
    """

    name: str
    module: torch.nn.Module
    calls: list[Call]
    sizes: dict[str, int]
    shares: dict[str, float]
    path: list[tuple[str, float]] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Σ p_i size_i / Σ size_i."""
        whole = sum(self.shares[site] * size for site, size in self.sizes.items())
        return whole / sum(self.sizes.values())

    def inner(self, site: str) -> str:
        """The name of a site where the block stands alone."""
        prefix = f"{self.name}." if self.name else ""
        return "+".join(part.removeprefix(prefix) for part in site.split("+"))


class Greedy:
    """A function from p to the share of each site, for sites that lie in blocks.

    Args:
        model: a module in eval mode.
        batches: tensors, tuples of arguments or dicts of keyword arguments: the first ones are run.
        blocks: patterns of the blocks' names, as of :func:`sparsecc.networks.outermost`.
        seen: of this model, with ``options``: the thresholds are quantiles of it.
        skip: patterns of sites that stay as they are.
        step: by how much p of a block's largest layer rises.
        rows: tokens that a block is run on, or those of one call if that has more.
        options: of the backend.
    Raises:
        OptionsError: a pattern matches no module.
        CalibrationError: the model is no module, an argument is out of its range, or a block is not called.
    """

    def __init__(
        self,
        model: Any,
        batches: Iterable[Any],
        blocks: Sequence[str] | str,
        seen: Observations,
        *,
        skip: Sequence[str] = (),
        step: float = 0.05,
        rows: int = ROWS,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        _positive("step", step, most=1)
        _positive("rows", rows, most=math.inf)
        found = outermost(model, blocks)
        self.step, self.options = step, options
        sites = not_skipped(seen.sites, skip)
        calls = _calls(model, batches, found, rows)
        self.blocks: list[_Block] = []
        for name, module in found.items():
            prefix = f"{name}." if name else ""
            own = [s for s in sites if all(part.startswith(prefix) for part in s.split("+"))]
            if not own:
                raise CalibrationError(f"{name} holds no linear layer that may be sparse.")
            sizes = {site: math.prod(seen.sites[site].shape) for site in own}
            block = _Block(name, module, calls[name], sizes, dict.fromkeys(own, 0.0))
            self.blocks.append(block)
        self.inputs = {site: seen.input(site) for block in self.blocks for site in block.sizes}

    def __call__(self, target: float) -> dict[str, float]:
        """Of every site in a block its own sparsity; a block's mean, weighted by size, is ``target``."""
        found: dict[str, float] = {}
        for block in self.blocks:
            if block.mean < target:
                self._extend(block, target)
            found |= _until(block, target)
        return found

    def _extend(self, block: _Block, target: float) -> None:
        """Rises until the block's mean is at least ``target``."""
        largest = max(block.sizes.values())
        with simulated_sparse(block.module, self.options) as simulation:
            exact = [_output(simulation, call) for call in block.calls]
            _check(block, simulation, exact)
            while block.mean < target:
                errors = {}
                for site, size in block.sizes.items():
                    raised = min(1.0, block.shares[site] + self.step * largest / size)
                    if raised > block.shares[site]:
                        shares = {**block.shares, site: raised}
                        error = _error(simulation, block, shares, self.inputs, exact)
                        errors[site] = (error, raised)
                if not errors:  # every p_i is 1: what the sum lacks is rounding
                    break
                site = min(errors, key=lambda name: errors[name][0])
                block.shares[site] = errors[site][1]
                block.path.append((site, block.shares[site]))


def _positive(name: str, value: Any, most: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value <= most:
        raise CalibrationError(
            f"teal: {name} is a number above 0 and at most {most}, not {value!r}."
        )


def _until(block: _Block, target: float) -> dict[str, float]:
    """The shares where the mean reaches ``target``: of the rise that passes it a part is taken."""
    shares = dict.fromkeys(block.sizes, 0.0)
    left = target * sum(block.sizes.values())
    for site, raised in block.path:
        size = block.sizes[site]
        cost = (raised - shares[site]) * size
        if cost >= left:
            shares[site] += left / size
            break
        shares[site], left = raised, left - cost
    return shares


def _error(
    simulation: SparseSimulation,
    block: _Block,
    shares: Mapping[str, float],
    inputs: Mapping[str, Statistics],
    exact: Sequence[torch.Tensor],
) -> float:
    """‖Y − Ŷ‖₂² over all calls."""
    recipe = Recipe("teal")
    for site, share in shares.items():
        if share > 0:
            name = block.inner(site)
            recipe.sparsity[name] = {"law": "input"}
            recipe.thresholds[name] = torch.tensor([inputs[site].percentile(share)])
    simulation.use(recipe)
    found = 0.0
    for call, wanted in zip(block.calls, exact, strict=True):
        found += float((_output(simulation, call).double() - wanted.double()).square().sum())
    return found if math.isfinite(found) else math.inf


def _check(block: _Block, simulation: SparseSimulation, exact: Sequence[torch.Tensor]) -> None:
    """That the block alone is what it is in the model, with the same layers.

    Raises:
        CalibrationError: it is not.
    """
    lost = [site for site in block.sizes if block.inner(site) not in simulation.sites]
    if lost:
        raise CalibrationError(
            f"{', '.join(lost)}: no layer of {block.name or 'the model'} where it runs alone. Give blocks that "
            "call their layers themselves, or skip these."
        )
    for call, wanted in zip(block.calls, exact, strict=True):
        again = _output(simulation, call)
        if again.shape != wanted.shape or not torch.equal(again, wanted):
            raise CalibrationError(
                f"{block.name} gives another result when it is called again: call the model without a cache "
                "(use_cache=False), in eval mode."
            )


def _output(simulation: SparseSimulation, call: Call) -> torch.Tensor:
    found = first_tensor((simulation.run(*call),))
    if found is None:
        raise CalibrationError("a block returns no tensor of floats.")
    return found


def _calls(
    model: torch.nn.Module,
    batches: Iterable[Any],
    blocks: Mapping[str, torch.nn.Module],
    rows: int,
) -> dict[str, list[Call]]:
    """What each block is called with: at most ``rows`` tokens, but at least one call."""
    calls: dict[str, list[Call]] = {name: [] for name in blocks}
    left = dict.fromkeys(blocks, rows)

    def watch(name: str) -> Any:
        def hook(_: Any, args: Any, kwargs: Any) -> None:
            x = first_tensor((*args, *kwargs.values()))
            if x is None:
                raise CalibrationError(
                    f"{name} is no block: it is called without a tensor of floats."
                )
            count = x[..., 0].numel()
            if calls[name] and count > left[name]:
                left[name] = 0
                return
            # What the model does to it later, in place, is not to be seen.
            calls[name].append(tree_map(_kept, (args, kwargs)))
            left[name] -= count

        return hook

    handles = [m.register_forward_pre_hook(watch(n), with_kwargs=True) for n, m in blocks.items()]
    try:
        with torch.no_grad():
            for batch in batches:
                args, kwargs = arguments(batch)
                model(*args, **kwargs)
                if all(count <= 0 for count in left.values()):
                    break
    finally:
        for handle in handles:
            handle.remove()
    for name, found in calls.items():
        if not found:
            raise CalibrationError(f"{name} was not called: there are no batches, or none uses it.")
    return calls


def _kept(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value
