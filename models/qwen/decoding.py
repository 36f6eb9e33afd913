"""The state of N answers while they are decoded, one token a step, over the cache of their prompts.

On CUDA the step runs on static shapes and is captured once in a CUDA graph and replayed; on CPU the same step runs as it is.

Letters: B prompts, G answers a prompt, N = B*G rows (fewer once finished rows are dropped), P prompt tokens, V vocabulary.
"""

import torch

from models.qwen.kv_cache import RolloutCache

WARM_UP_STEPS = 2  # eager steps before capture: libraries allocate their workspaces in them


class Decoding:
    """`step(token_ids)` appends a token to every row and returns the next logits; `select(rows)` drops rows."""

    def __init__(
        self,
        model,
        cache: RolloutCache,
        prompt_mask: torch.Tensor,
        next_position: torch.Tensor,
        num_answers: int,
        max_new_tokens: int,
        static: bool | None = None,
    ):
        self.model, self.cache = model, cache
        on_cuda = model.lm_head.weight.is_cuda
        self.static = on_cuda if static is None else static
        # Under autocast every replay would cast every weight again, so only weights that are computed with as they are get a graph.
        self.capturable = on_cuda and self.static and not torch.is_autocast_enabled("cuda")
        cache.expand(num_answers, max_new_tokens, static=self.static)
        self.position = next_position.repeat_interleave(num_answers)
        self.key_mask = None  # (N, 1, 1, keys), True where a key is real; None where all are
        if self.static or not bool(prompt_mask.all()):
            answers = prompt_mask.new_full((prompt_mask.shape[0], max_new_tokens), int(not self.static))
            mask = torch.cat([prompt_mask, answers], 1).bool()
            self.key_mask = mask.repeat_interleave(num_answers, 0)[:, None, None]
        self.token_ids = torch.zeros_like(self.position)
        self.graph, self.logits, self.steps = None, None, 0

    def step(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids (N,) -> logits of the token after them, (N, V) float32."""
        self.token_ids.copy_(token_ids)
        self.steps += 1
        if not self.capturable:
            return self._forward()
        if self.graph is None and self.steps > WARM_UP_STEPS:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self._forward()
        if self.graph is None:
            return self._forward()
        self.graph.replay()
        return self.logits

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows (M,) only."""
        self.cache.select(rows)
        self.position, self.token_ids = self.position[rows], self.token_ids[rows]
        self.key_mask = None if self.key_mask is None else self.key_mask[rows]
        self.graph, self.steps = None, 0

    def _forward(self) -> torch.Tensor:
        mask = self.key_mask
        if self.static:
            mask.index_fill_(3, self.cache.position, True)
        elif mask is not None:
            mask = mask[..., : self.cache.layers[0].length + 1]
        out = self.model.model.language_model(
            inputs_embeds=self.model.get_input_embeddings()(self.token_ids[:, None]),
            position_ids=self.position[None, :, None].expand(3, -1, 1),
            attention_mask={"full_attention": mask},
            past_key_values=self.cache,
            use_cache=True,
        )
        self.position += 1
        self.cache.advance()
        return self.model.lm_head(out.last_hidden_state[:, -1]).float()
