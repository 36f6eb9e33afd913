"""Uni-MedVLM on disk: its networks from published folders, and whole checkpoints of it."""
