"""Text to token ids and back through the original tokenizer, chat templates, streams and stop strings."""
