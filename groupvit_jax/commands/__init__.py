"""Commands: scoring and segmentation for eval.py, import, and export with its model card."""
