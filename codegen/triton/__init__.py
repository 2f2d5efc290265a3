"""Triton for GPUs, emitted from the specs of the ``sparsecc::`` operators, without importing Triton."""

from __future__ import annotations

from sparsecc.codegen.triton import build, few_rows, launch, launch_rows, rows

__all__ = ["build", "few_rows", "launch", "launch_rows", "rows"]
