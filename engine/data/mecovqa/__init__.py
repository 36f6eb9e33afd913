"""MeCoVQA: questions about medical images, their regions and masks, as MedPLIB publishes them, and SA-Med2D-20M's names."""
