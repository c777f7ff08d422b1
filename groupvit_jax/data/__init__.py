"""Training data: sources, images, captions and batches."""
