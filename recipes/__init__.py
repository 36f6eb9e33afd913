"""Recipes: one module a documented training, evaluation or preparation stage. `python -m recipes` lists them."""
