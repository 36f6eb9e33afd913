"""The data of the runs without flags: real images that pip packages carry, with drawn lesions where masks are needed."""
