"""Recipes: one module a documented training, evaluation or preparation stage. `python -m recipes` lists them."""

import sys

if sys.argv[:1] == ["-m"]:  # `python -m recipes.X` is at its first import
    from engine.command.streams import start_process

    start_process()
