"""Triton for GPUs, emitted from the specs of the ``sparsecc::`` operators."""
