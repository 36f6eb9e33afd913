"""A command from its flags to its run folder: arguments, settings, what it prints and how it ends."""
