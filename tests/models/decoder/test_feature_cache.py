"""The feature cache computes what it lacks, keeps to its limit, and drops what was not asked for the longest."""

import torch

from models.decoder.feature_cache import FeatureCache


class Tower:
    """Features of image i are rows of i; remembers what it was asked for."""

    def __init__(self):
        self.seen = []

    def ask(self, cache, keys):
        def compute(places):
            self.seen += [keys[place] for place in places]
            return [torch.full((5, 2), float(keys[place])) for place in places]

        found = cache.of(keys, compute)
        assert [int(features[0, 0]) for features in found] == keys and all(features.shape == (5, 2) for features in found)


def test_features_are_computed_once_also_where_a_key_comes_twice():
    tower, cache = Tower(), FeatureCache(1000)
    tower.ask(cache, [1, 2, 1])
    tower.ask(cache, [2, 3])
    assert sorted(tower.seen) == [1, 2, 3] and len(cache) == 3 and cache.num_bytes == 3 * 40


def test_the_longest_unasked_go_first_and_a_batch_beyond_the_limit_is_answered_all_the_same():
    tower, cache = Tower(), FeatureCache(80)
    tower.ask(cache, [1, 2])
    tower.ask(cache, [1])
    tower.ask(cache, [3])  # 2 goes
    tower.ask(cache, [1])
    assert tower.seen == [1, 2, 3]
    tower.ask(cache, [2])
    assert tower.seen == [1, 2, 3, 2] and cache.num_bytes == 80
    tower.ask(cache, [4, 5, 6, 7])
    assert len(cache) == 2 and cache.num_bytes == 80


def test_kept_features_are_not_views_of_a_batch():
    cache = FeatureCache(1000)
    batch = torch.zeros(6, 2)
    cache.of([0, 1], lambda places: batch.split(3))
    batch.add_(1)
    assert all(not features.any() for features in cache.of([0, 1], lambda places: []))


def test_a_cleared_cache_computes_again():
    tower, cache = Tower(), FeatureCache(1000)
    tower.ask(cache, [1])
    cache.clear()
    assert len(cache) == cache.num_bytes == 0
    tower.ask(cache, [1])
    assert tower.seen == [1, 1]
