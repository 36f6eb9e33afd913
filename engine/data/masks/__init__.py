"""Mask files: which files are the masks of an image, and which of their values are the lesion."""
