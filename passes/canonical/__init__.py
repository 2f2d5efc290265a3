"""Raising passes: the many spellings of one idea become one operator."""
