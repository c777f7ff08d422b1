"""Zero-shot evaluation: segmentation, classification and pictures of results."""
