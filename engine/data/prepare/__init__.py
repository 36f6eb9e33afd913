"""Published data as they are downloaded become folders that training reads: one module a system's data."""
