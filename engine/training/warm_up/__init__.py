"""What a small model brings along that starts from nothing, before the training that is published."""
