"""A trained model leaves Python: a bundle of compiled packages, their weights, and a manifest that says what they are."""
