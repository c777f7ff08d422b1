"""Training data: sources, pictures, words and batches."""
