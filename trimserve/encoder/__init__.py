"""Encoders: texts to embeddings, classes and the like."""
