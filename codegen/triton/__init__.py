"""Triton for GPUs, emitted from the specs of the ``sparsecc::`` operators, without importing Triton."""

from __future__ import annotations

from sparsecc.codegen.triton import build, few_rows, launch

__all__ = ["build", "few_rows", "launch"]
