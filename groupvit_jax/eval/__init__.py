"""Zero-shot evaluation: segmentation, classification and drawings of results."""
