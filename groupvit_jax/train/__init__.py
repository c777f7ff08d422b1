"""Training: the loop and its step, state, optimiser, checkpoints, logs, and evaluation during a run."""
