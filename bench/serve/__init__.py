"""Exported bundles in our binaries against Python and against other runtimes, on one CPU thread."""
