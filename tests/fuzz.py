"""How many inputs each fuzz test tries, and that they are the same ones each time.

VESALIUS_FUZZ=100000 pytest -k fuzz     more of them; a failure prints the input to put into a test of its own
"""

import os
from collections.abc import Sequence

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

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


def joined(pieces: Sequence[str], most: int) -> st.SearchStrategy[str]:
    """At most so many of the pieces, one after another: as `st.lists(st.sampled_from(...))`, and ten times as quick."""
    return st.binary(max_size=most).map(lambda places: "".join(pieces[place % len(pieces)] for place in places))
