"""The norm family: exact rewrites of normalization layers."""
