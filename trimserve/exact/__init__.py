"""Exact mode: the proof that a drafted token is the full model's."""
