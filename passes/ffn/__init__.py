"""Feed-forward networks of which live neurons alone count."""
