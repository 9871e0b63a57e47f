"""Fine-tuning with the kept rows alone."""
