"""Image features that are computed once, while the vision tower that makes them stays as it is."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence

from torch import Tensor


class FeatureCache:
    """Features by image key, at most `limit` bytes of them; the least recently used go first."""

    def __init__(self, limit: int):
        self.limit, self.num_bytes = limit, 0
        self._kept: OrderedDict[Hashable, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def of(self, keys: Sequence[Hashable], compute: Callable[[list[int]], Iterable[Tensor]]) -> list[Tensor]:
        """The features of each key. Where some are not here, `compute(places)` is asked for those of `keys[place]`, in order."""
        missing = {key: place for place, key in enumerate(keys) if key not in self._kept}
        if missing:
            for key, features in zip(missing, compute(list(missing.values())), strict=True):
                self._kept[key] = features.clone()  # not a view that keeps the whole batch's alive
                self.num_bytes += features.nbytes
        for key in keys:
            self._kept.move_to_end(key)
        found = [self._kept[key] for key in keys]
        while self.num_bytes > self.limit:
            self.num_bytes -= self._kept.popitem(last=False)[1].nbytes
        return found

    def clear(self) -> None:
        """Forget all, because the weights that made them have changed."""
        self._kept.clear()
        self.num_bytes = 0
