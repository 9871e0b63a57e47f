"""Fine-tuning with the kept rows alone: the half of `trimserve.finetune` that needs torch."""
