"""GroupViT's networks: two towers, grouping blocks and projectors (Flax linen)."""
