"""Structured rewrites of feed-forward networks."""
