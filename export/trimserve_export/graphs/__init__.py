"""ONNX graphs: reading and writing them, and finding embeddings, head and values in them."""
