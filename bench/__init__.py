"""Benchmarks: every performance claim of the project, as a command that measures it."""
