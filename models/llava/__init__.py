"""LLaVA-Med v1.5 from its original checkpoint layout."""
