"""Who answers: between the groups of GRPO and the loop over tokens, so that another engine can do the sampling."""

from typing import Any, Protocol

from engine.rollout.policy import Policy
from engine.rollout.rollout import Rollout, rollout
from engine.rollout.sampling import SamplingParams


class Sampler(Protocol):
    """Samples answers to prompts with the policy's present weights."""

    def sample(
        self, encoded: list[Any], params: SamplingParams, *, num_answers: int, max_new_tokens: int, seeds: list[int]
    ) -> Rollout:
        """`num_answers` to each of B prompts, as the policy's processor encoded them; those of one prompt lie together.

        `seeds` (one a prompt) decide the randomness. The log-probs are those of the distribution sampled from.
        """


class LocalSampler:
    """The engine's own: the policy answers on its device, `batch_size` prompts at once (None: all)."""

    def __init__(self, policy: Policy, batch_size: int | None = None):
        self.policy, self.batch_size = policy, batch_size

    def sample(
        self, encoded: list[Any], params: SamplingParams, *, num_answers: int, max_new_tokens: int, seeds: list[int]
    ) -> Rollout:
        size = self.batch_size or len(encoded)
        parts = [
            rollout(
                self.policy,
                self.policy.batch(encoded[start : start + size]),
                params,
                num_generations=num_answers,
                max_new_tokens=max_new_tokens,
                seeds=seeds[start : start + size],
            )
            for start in range(0, len(encoded), size)
        ]
        return Rollout.join(parts, self.policy.pad_token_id)
