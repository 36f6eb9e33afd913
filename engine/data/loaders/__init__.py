"""Images are decoded once: what was decoded is kept on the disk and mapped into memory from then on."""
