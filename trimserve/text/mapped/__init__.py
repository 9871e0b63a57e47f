"""Tokenizers whose model is tables that are mapped, instead of objects in memory."""
