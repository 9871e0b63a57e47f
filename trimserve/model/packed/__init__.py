"""Checkpoints of AWQ, GPTQ and compressed-tensors: integers in blocks, by transformers' names."""
