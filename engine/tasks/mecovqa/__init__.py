"""Questions of MeCoVQA: answered in words, about an image or a region of it, and with masks; and captions."""
