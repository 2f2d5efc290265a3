"""C++ for CPUs, emitted from the specs of the ``sparsecc::`` operators."""

from __future__ import annotations

from sparsecc.codegen.cpp import cached_attention, few_rows, rows, sparse_ffn

__all__ = ["cached_attention", "few_rows", "rows", "sparse_ffn"]
