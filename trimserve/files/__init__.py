"""Files: safetensors headers, artefacts written whole or not at all, hashes, quantised rows, the hub."""
