"""Training, checkpoints and predictions."""
