"""Training: the objective, optimizers, checkpoints and the loop."""
