"""Triton for GPUs, emitted from the specs of the ``sparsecc::`` operators, without importing Triton."""

from __future__ import annotations

from sparsecc.codegen.triton import (
    build,
    cached_attention,
    few_rows,
    launch,
    launch_attention,
    launch_rows,
    launch_sparse_ffn,
    rows,
    sparse_ffn,
)

__all__ = [
    "build",
    "cached_attention",
    "few_rows",
    "launch",
    "launch_attention",
    "launch_rows",
    "launch_sparse_ffn",
    "rows",
    "sparse_ffn",
]
