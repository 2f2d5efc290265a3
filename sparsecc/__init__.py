"""sparsecc: published efficiency methods as verified compiler passes for PyTorch.

    fast = torch.compile(model, backend="sparsecc")

Importing this package is quick and has no side effects; names load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "rewrite": "sparsecc.export",
    "bake": "sparsecc.export",
    "calibrate": "sparsecc.calibration",
    "sparsify": "sparsecc.sparsity",
    "reset_cores": "sparsecc.runtime.ops.cores",
    "live_neurons": "sparsecc.counting",
    "reset_live_neurons": "sparsecc.counting",
    "load_quantized": "sparsecc.checkpoints",
    "explain": "sparsecc.inspection",
    "verify": "sparsecc.inspection",
    "Report": "sparsecc.report.model",
    "Recipe": "sparsecc.recipe",
    "Options": "sparsecc.options",
    "Program": "sparsecc.program",
    "Exactness": "sparsecc.passes.base",
    "Pass": "sparsecc.passes.base",
    "SparseccError": "sparsecc.errors",
    "OptionsError": "sparsecc.errors",
    "CalibrationError": "sparsecc.errors",
    "CheckpointError": "sparsecc.errors",
    "RecipeError": "sparsecc.errors",
    "RequirementError": "sparsecc.errors",
    "VerificationError": "sparsecc.errors",
}

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "Exactness",
    "Options",
    "OptionsError",
    "Pass",
    "Program",
    "Recipe",
    "RecipeError",
    "Report",
    "RequirementError",
    "SparseccError",
    "VerificationError",
    "__version__",
    "bake",
    "calibrate",
    "explain",
    "live_neurons",
    "load_quantized",
    "reset_cores",
    "reset_live_neurons",
    "rewrite",
    "sparsify",
    "verify",
]

if TYPE_CHECKING:
    from sparsecc.calibration import calibrate
    from sparsecc.checkpoints import load_quantized
    from sparsecc.counting import live_neurons, reset_live_neurons
    from sparsecc.errors import (
        CalibrationError,
        CheckpointError,
        OptionsError,
        RecipeError,
        RequirementError,
        SparseccError,
        VerificationError,
    )
    from sparsecc.export import bake, rewrite
    from sparsecc.inspection import explain, verify
    from sparsecc.options import Options
    from sparsecc.passes.base import Exactness, Pass
    from sparsecc.program import Program
    from sparsecc.recipe import Recipe
    from sparsecc.report.model import Report
    from sparsecc.runtime.ops.cores import reset_cores
    from sparsecc.sparsity import sparsify


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'sparsecc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
