"""Trimmed folders from an ONNX graph that another tool exported."""
