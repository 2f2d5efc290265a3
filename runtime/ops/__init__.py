"""The operators of ``sparsecc::``. Importing this registers all of them, as loading a saved model needs."""

from sparsecc.runtime.ops import cached_attention, few_rows, rounded_weight, rows

__all__ = ["cached_attention", "few_rows", "rounded_weight", "rows"]
