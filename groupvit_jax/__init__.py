"""GroupViT in JAX: semantic segmentation that emerges from captions."""
