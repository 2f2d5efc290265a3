"""What kernels of ``sparsecc::few_rows`` are tried on, whatever language they are in, and how near is near."""

from __future__ import annotations

from typing import Any

import kernel_cases
import torch
from kernel_cases import Case, Run
from precision import same_special_values, wide

from sparsecc.runtime.ops.few_rows import Spec, meaning

SPECS = {
    "one": Spec("none", 0.0, ("p0",)),
    "q, k, v": Spec("rms", 1e-6, ("p0", "p1 + v0", "p2")),
    "gate and up": Spec("layer", 1e-5, ("silu(p0) * p1",)),
    "residual": Spec("none", 0.0, ("t0 + p0",)),
    "everything": Spec(
        "rms",
        None,
        ("-gelu(p0 + v0) / (2 + sigmoid(p1))", "relu(tanh(p2) - 0.125) * t1", "gelu_tanh(p2)"),
    ),
}
FEATURES = {"one": (7,), "q, k, v": (8, 3, 5), "gate and up": (9, 9), "residual": (6,)}
FEATURES["everything"] = (5, 5, 13)
ROWS = [(1,), (2,), (3,), (5,), (16,), (2, 1, 3), (53,)]
SIZES = [1, 3, 8, 16, 33, 96, 577]


def inputs(
    name: str,
    rows: tuple[int, ...],
    size: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    times: int = 1,
) -> Case:
    """x, weights and operands of a spec; ``times`` as many features as ``FEATURES`` says."""
    features = [n * times for n in FEATURES[name]]
    x = torch.randn(*rows, size)
    weights = [torch.randn(n, size) / size**0.5 for n in features]
    spec = SPECS[name]
    operands: list[torch.Tensor] = []
    for j in range(len(spec.outputs)):
        for operand in spec.operands(j):
            n = features[spec.weights(j)[0]]
            operands.append(torch.randn(n) if operand[0] == "v" else torch.randn(*rows, n))

    def cast(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [t.to(device, dtype) for t in tensors]

    return x.to(device, dtype), cast(weights), cast(operands)


def exact(case: Case, text: str) -> list[torch.Tensor]:
    x, weights, operands = case
    return meaning(x.double(), wide(weights), wide(operands), text)


def check(run: Run, name: str, *cases: Case) -> None:
    """Over all ``cases``, each output's root mean square error is at most 1.5 times that of its meaning."""
    kernel_cases.check(SPECS[name], *cases, run=run)


def check_special_values(
    run: Run, name: str, special: float, rows: tuple[int, ...], **like: Any
) -> None:
    """A NaN or infinity in x, a weight or an operand is where it is in the meaning."""
    text = SPECS[name].text()
    for place in ("x", "weight", "operand"):
        x, weights, operands = case = inputs(name, rows, 33, **like)
        if place == "x":
            x[1, 5] = special
        elif place == "weight":
            weights[0][2, 7] = special
        elif operands:
            operands[0].view(-1)[1] = special
        got = run(*case, text)
        # In fp64: PyTorch's own gelu(inf) in fp32 is NaN in vector code and infinity in scalar code.
        same_special_values(got, exact(case, text))
