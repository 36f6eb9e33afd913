"""What decoder-only language models have in common, whatever is before them: attention over shared prompts, caches, decoding."""
