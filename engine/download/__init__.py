"""Files of others, fetched: what a bucket and what the Hugging Face Hub list, and the one way to fetch what is listed."""
