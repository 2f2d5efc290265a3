"""MLIR text in the ``torch`` dialect, through torch-mlir (``pip install sparsecc[mlir]``)."""

from __future__ import annotations

import warnings

import torch

from sparsecc.errors import ModelError

_SMALL = 64  # bytes of a constant that stays in the text when weights are left out


def to_mlir(program: torch.export.ExportedProgram, *, weights: bool = False) -> str:
    """``program`` as an MLIR module in the torch dialect.

    Operators stay whole (``torch.aten.layer_norm``, ``torch.aten.rms_norm``): torch-mlir's raw
    import needs no decompositions. The text parses again with the torch dialect registered.

    Args:
        program: an export without decompositions, before or after :func:`sparsecc.rewrite`.
        weights: also write the weights' bytes (as hexadecimal, twice their size); left out, they
            keep their names and types only.
    Raises:
        ModelError: torch-mlir is not installed, or has no operator for some node.
    """
    try:
        from torch_mlir.fx import export_and_import
    except ImportError as error:
        raise ModelError(
            f"format 'mlir' needs torch-mlir, which cannot be imported ({error}). "
            "Install it with: pip install sparsecc[mlir]"
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch-mlir copies non-writable arrays
            module = export_and_import(program, output_type="raw", decomposition_table={})
    except Exception as error:
        raise ModelError(
            f"torch-mlir cannot import this program: {type(error).__name__}: {error}\n"
            "Its text is still available with --format text or --format json."
        ) from error
    limit = {} if weights else {"large_resource_limit": _SMALL, "large_elements_limit": _SMALL}
    return str(module.operation.get_asm(**limit)).rstrip() + "\n"
