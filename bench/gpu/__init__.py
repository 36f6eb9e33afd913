"""Every kernel on the GPU at hand: `python -m bench.gpu` runs the cases of the other modules here."""
