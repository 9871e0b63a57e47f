"""Serve a language model with the vocabulary rows a domain uses, and the full model's results."""

__version__ = "0.1.0"
