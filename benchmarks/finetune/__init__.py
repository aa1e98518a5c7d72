"""Fine-tuning with pruning in place."""
