"""The levels of one structure over a volume, from a model that is asked slice by slice."""

from collections.abc import Iterable, Mapping

import numpy as np

from engine.data.volumes.finished import Ask
from engine.data.volumes.labels import INSIDE
from engine.data.volumes.propagate import Drawn, Prompt, propagate
from engine.data.volumes.volume import Volume
from engine.progress import progress


def carried(ask: Ask, volume: Volume, prompts: Mapping[int, Prompt], name: str, only: int | None = None) -> np.ndarray:
    """[slices, rows, columns] uint8, 0 where the structure is not: carried from its prompts, or asked for everywhere without any.

    `only`: the one slice that is asked about. `name` stands at the progress bar.
    """
    levels = np.zeros(volume.shape, np.uint8)
    answered: dict[int, np.ndarray] = {}

    def segment(index: int, prompt: Prompt) -> tuple[np.ndarray, float]:
        answered[index], score = ask(index, prompt)
        return answered[index] >= INSIDE, score

    places = range(volume.shape[0]) if only is None else [only]
    if only is not None or not prompts:
        drawn: Iterable[Drawn] = (Drawn(place, *segment(place, prompts.get(place, Prompt()))) for place in places)
    else:
        grey = None if volume.is_colour else lambda index: np.nan_to_num(volume.voxels[index], posinf=0, neginf=0)
        drawn = propagate(segment, volume.shape[0], prompts, grey=grey)
    for each in progress(drawn, desc=name, total=len(places), unit="slice", delay=2):
        levels[each.slice] = answered[each.slice]
    return levels
