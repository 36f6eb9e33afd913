"""Measures of answers and masks, attacks on images, and the judge."""
