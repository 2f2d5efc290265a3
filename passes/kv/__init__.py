"""Passes around the cache of keys and values."""
