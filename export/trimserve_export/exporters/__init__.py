"""Exporters: what makes an ONNX graph of a checkpoint, and which of them fits a model."""
