"""A Qwen-VL leaves Python: its networks, what of prompt and image is worked out beside them, and its chat template as segments."""
