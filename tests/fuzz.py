"""How many inputs each fuzz test tries, and that they are the same ones each time.

VESALIUS_FUZZ=100000 pytest -k fuzz     more of them; a failure prints the input to put into a test of its own
"""

import os

from hypothesis import HealthCheck, settings

FEWEST = 10_000


def bounded(num_inputs: int = FEWEST) -> settings:
    """Decorator of a `@given` test: seeded, nothing kept between runs, no limit on an input's time."""
    return settings(
        max_examples=int(os.environ.get("VESALIUS_FUZZ", num_inputs)),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
