"""PRS-Med (arXiv:2505.11872): a question about an image is answered in words and with a mask.

`compat="reference"` is the published code's behaviour, with all that its numbers depend on. What it changes, and where:

    processor   another prompt at inference than in training; the loss counts the question too, and no end token is learnt; texts
                are cut at 512 tokens; every position (the answer's and the padding's) is a prompt state of the mask decoder;
                masks to learn have soft edges
    adapters    in the language model's own type; the vision tower has some too, which never learn
    loading     inference loses the adapters
"""
