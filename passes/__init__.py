"""What sparsecc rewrites: one pass a file, in families; see :mod:`sparsecc.passes.registry`."""
