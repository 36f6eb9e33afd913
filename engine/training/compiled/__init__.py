"""`torch.compile` of the layers that a network repeats."""
