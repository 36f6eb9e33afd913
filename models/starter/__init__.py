"""The small models of the runs without flags."""
