"""Answers that others gave: which of them are right and in form, and what a model is taught of them."""
