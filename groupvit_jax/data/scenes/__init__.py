"""Embedded scenes: synthetic images with captions and label maps."""
