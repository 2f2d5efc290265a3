"""Passes for quantization, and the exact transforms that prepare for it."""
