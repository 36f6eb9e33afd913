"""Skin lesions: the task, how its answers are read and scored, and the published rewards."""
