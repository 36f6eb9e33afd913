"""A server that viewers of volumes speak to, by nnInteractive's protocol over HTTP. It knows no model: see `segmenter.py`."""
