"""ONNX Runtime: sessions, decoder steps, the KV cache, cold rows and the cold head."""
