"""Exporters: a checkpoint folder in, an ONNX graph out. One module an exporter."""
