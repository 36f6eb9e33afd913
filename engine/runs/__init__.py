"""Runs from start to end: train, evaluate, evaluate under attack."""
