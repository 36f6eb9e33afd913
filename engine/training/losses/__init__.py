"""What is minimised, beside the losses that are kernels."""
