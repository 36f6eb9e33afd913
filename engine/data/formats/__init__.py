"""Rows as others write them: encodings, JSON, files of a split, names of columns and of images."""
