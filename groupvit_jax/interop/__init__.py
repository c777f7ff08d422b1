"""Weights in other formats: Hugging Face, the authors' checkpoints, StableHLO, safetensors."""
