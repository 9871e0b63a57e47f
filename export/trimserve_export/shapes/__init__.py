"""Symbolic shapes: the sizes of a graph's values, and the shape arithmetic that they replace."""
