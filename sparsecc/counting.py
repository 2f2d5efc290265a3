"""How many neurons were live at run time: counted by layer, where the option ``count`` asks for it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from sparsecc.passes.analysis.sites import site_name
from sparsecc.passes.analysis.weights import weight_values
from sparsecc.passes.base import Analyses
from sparsecc.program import Program
from sparsecc.runtime.ops.sparse_ffn import Spec, sparse_ffn


def label(program: Program) -> int:
    """Give every sparse product the name of its down projection; returns how many have one."""
    nodes = list(program.calls(sparse_ffn))
    if nodes:
        weights = Analyses(program).get(weight_values)
    count = 0
    for node in nodes:
        x, tensors, operands, only, text = node.args
        spec = Spec.of(str(text))
        name = site_name(program, tensors[spec.slots[-1].start], weights)  # type: ignore[index,arg-type]
        if name:
            node.args = (x, tensors, operands, only, replace(spec, label=name).text())
            count += 1
    return count


def live_neurons() -> dict[str, float]:
    """The share of neurons that were live for a row, by the name of the layer that reads them.

    Of all calls since the last :func:`reset_live_neurons` of models that were compiled with ``count=True``, by
    kernels on CPU or GPUs, which are waited for; graphs without a kernel are not counted.
    """
    from sparsecc.codegen.cpp import sparse_ffn as kernels
    from sparsecc.codegen.triton import live_counts

    live: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    for name, c in kernels.counters().items():
        live[name] += c.live
        seen[name] += c.rows * c.neurons
    for name, devices in live_counts.counters().items():
        for _, rows, count, _, neurons in devices:
            live[name] += count
            seen[name] += rows * neurons
    return {name: live[name] / count for name, count in seen.items() if count}


def reset_live_neurons() -> None:
    """Count from zero."""
    from sparsecc.codegen.cpp import sparse_ffn as kernels
    from sparsecc.codegen.triton import live_counts

    kernels.reset_counters()
    live_counts.reset_counters()
