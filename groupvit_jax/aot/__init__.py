"""Ahead-of-time compilation of the training step for TPU pods: `python -m groupvit_jax.aot`."""
