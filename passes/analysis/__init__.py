"""Facts that passes ask for: aliasing, parameter-only values, linear maps, the residual stream."""
