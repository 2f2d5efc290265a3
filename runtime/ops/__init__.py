"""The ``sparsecc::`` operators: a schema, shapes, and a meaning in ATen; devices register their kernels."""
