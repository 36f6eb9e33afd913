"""What a run leaves for its reader: the page, the curves, pictures with masks and boxes drawn. Knows no model and no task."""
