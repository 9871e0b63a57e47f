"""Decoder graphs in ONNX Runtime's fused operators: attention in one node, products of one input in one."""
