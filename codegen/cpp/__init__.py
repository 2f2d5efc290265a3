"""C++ for CPUs, emitted from the specs of the ``sparsecc::`` operators."""

from __future__ import annotations

from sparsecc.codegen.cpp import few_rows, rows

__all__ = ["few_rows", "rows"]
