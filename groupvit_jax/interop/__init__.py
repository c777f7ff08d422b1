"""Weights in and out: Hugging Face, the authors' checkpoints, StableHLO, safetensors."""
