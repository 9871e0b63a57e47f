"""Milliseconds a token of generators: full, compact and exact."""
