"""Settings of the trainers, as flags. They import without the trainers, so that --help is quick."""
