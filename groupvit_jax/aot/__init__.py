"""What a training step needs of a pod, found out without one: `python -m groupvit_jax.aot`."""
