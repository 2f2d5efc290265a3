"""Feed-forward networks: what is dead is not read."""
