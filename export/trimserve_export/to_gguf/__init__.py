"""From a model to a trimmed GGUF file, which llama.cpp loads with nothing beside it."""
