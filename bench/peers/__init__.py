"""Beside other tools: onnxruntime-genai, optimum, onnxsim."""
