"""The BatchNorm family: exact rewrites of normalization by running statistics."""
