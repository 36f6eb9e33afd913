"""Kinds of files as arrays: what Pillow alone reads with a loss or not at all, DICOM, and the common ones faster than it does."""
