"""Tasks: what is asked about a row, what counts as right, and what a report shows of it."""
