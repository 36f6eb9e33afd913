"""The trainers, each its batching and its loss on one thin base over `transformers.Trainer`."""
