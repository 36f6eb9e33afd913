"""Models: what Hugging Face lacks, and thin adapters over what it has. May import `kernels`, never `engine`."""
