"""Devices and processes: meshes and shardings, jax.distributed, signals, profiles, choice of attention."""
