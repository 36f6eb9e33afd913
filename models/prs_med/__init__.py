"""PRS-Med: a question about an image is answered in words and with a mask."""
