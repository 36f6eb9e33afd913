"""Uni-MedVLM: FILA's hybrid encoder (arXiv:2412.08378) and MedPLIB's mixture of experts (arXiv:2412.09278) in one model.

`compat="reference"` is the published code's behaviour. What it changes, and where:

    cvfm             normalises its output, so that it is not the identity at initialisation; the class token is fused too
    regions          are read at MedPLIB's points, which lie too far up and left
    text_hidden_fcs  is a single Linear
"""
