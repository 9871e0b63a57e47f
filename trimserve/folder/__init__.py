"""A trimmed folder: its file names, its manifest, opening and checking it, writing it."""
