"""Generators: what `generate`, `stream` and `chat` accept and give."""
