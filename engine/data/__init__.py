"""Data sets: reading, checking and preparing them."""
