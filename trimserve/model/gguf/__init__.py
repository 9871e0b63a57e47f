"""A GGUF file as a model's folder: its tokenizer, configs and tensors in the words of transformers."""
