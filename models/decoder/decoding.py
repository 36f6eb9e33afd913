"""The state of N answers while they are decoded, one token a step, over the cache of their prompts.

On CUDA the step is captured in a CUDA graph and replayed, on CPU the same step runs as it is. A graph reads weights and caches
where they lie, so both stay there: a room is the memory of a rollout, prompts at the end of lengths that are multiples of 128, and
a later rollout of as many prompts and answers takes it over with its graphs, one for each number of rows that a rollout came down
to. Where a weight has moved all rooms are left.

Under autocast weights are where autocast keeps its casts of trained ones until its end, which a rollout does not outlive: there a
room is for one rollout. Frozen float32 weights it casts anew at every use, so a step with such weights is not captured, nor is one
that waits for the device.

Letters: B prompts, G answers a prompt, N = B*G rows (fewer once finished rows are dropped), P prompt tokens, V vocabulary.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.cuda_graph import Capture, capture_on_cuda
from models.decoder.kv_cache import RolloutCache
from models.decoder.shared_prefix import UNREAD_MASK

logger = logging.getLogger(__name__)
ROOMS = 2  # that are kept: training's, and that of evaluation
LENGTHS = 128  # prompts have room for a multiple of this


@dataclass(frozen=True)
class LanguageModel:
    """`decoder`: the layers, called as those of Hugging Face; `embed`: ids (N, 1) -> (N, 1, H); `head`: (N, H) -> logits (N, V),
    by `head_weight`; `axes`: along how many a token has a position; `mask`: what the layers take as a mask, and do not read;
    `waits`: the host reads from the device within a step, as a mixture of experts does, so that no CUDA graph can hold one;
    `beside`: modules that `embed` and `head` read beside the decoder."""

    decoder: nn.Module
    embed: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor]
    head_weight: Tensor
    axes: int = 1
    mask: Any = UNREAD_MASK
    waits: bool = False
    beside: tuple[nn.Module, ...] = ()

    def weights(self) -> list[Tensor]:
        """All that a step reads but the cache."""
        modules = (self.decoder, *self.beside)
        return [self.head_weight, *(x for module in modules for x in (*module.parameters(), *module.buffers()))]


def casts_weights(model: LanguageModel, device_type: str) -> bool:
    """Whether each decode step casts weights: under autocast those in float32 that it does not keep its casts of."""
    if not torch.is_autocast_enabled(device_type):
        return False
    kept = torch.is_autocast_cache_enabled()
    return any(not (kept and weight.requires_grad) for weight in _float32_weights(model))


def _float32_weights(model: LanguageModel) -> list[Tensor]:
    """Those that autocast casts."""
    return [weight for weight in (*model.decoder.parameters(), model.head_weight) if weight.dtype == torch.float32]


class Room:
    """The memory of a rollout. cache: that of the prompts, expanded; next_position (B,): of the first token of their answers.

    `capture`: makes a graph of a step; None: every step runs as it is.
    """

    def __init__(self, model: LanguageModel, cache: RolloutCache, next_position: Tensor, capture: Capture | None):
        self.model, self.cache, self.capture = model, cache, capture
        self.position = next_position.repeat_interleave(cache.num_answers)  # (N,) of each answer's newest token
        self.token_ids = torch.zeros_like(self.position)
        self.parts = {len(self.position): cache}  # rows -> the cache of the first so many
        self.graphs: dict[int, tuple[Callable[[], None], Tensor]] = {}  # rows -> what replays their step, and its logits
        self.rollouts = 0

    def refill(self, cache: RolloutCache, prompt_mask: Tensor, next_position: Tensor) -> None:
        """Take in other prompts, as many, with their mask (B, P)."""
        self.cache.refill(cache, prompt_mask)
        self.position.copy_(next_position.repeat_interleave(self.cache.num_answers))

    def logits(self, rows: int) -> Tensor:
        """Those of the tokens after `token_ids` of the first `rows` answers, (rows, V) float32, valid until the next step."""
        if rows not in self.parts:
            self.parts[rows] = self.cache.first(rows)
        part = self.parts[rows]
        if self.capture is not None and rows not in self.graphs:
            try:
                replay, (logits,) = self.capture(lambda: (self._forward(part, rows),))
                self.graphs[rows] = replay, logits
            except RuntimeError as error:  # torch's and CUDA's, no memory included
                logger.warning("no CUDA graph of a decode step, it launches its kernels: %s", str(error).partition("\n")[0])
                self.capture = None
        if rows not in self.graphs:
            return self._forward(part, rows)
        replay, logits = self.graphs[rows]
        replay()
        return logits

    def _forward(self, cache: RolloutCache, rows: int) -> Tensor:
        """Moves no place on, so that a step may run twice."""
        position = self.position[:rows, None]
        out = self.model.decoder(
            inputs_embeds=self.model.embed(self.token_ids[:rows, None]),
            position_ids=position if self.model.axes == 1 else position.expand(self.model.axes, -1, 1),
            attention_mask=self.model.mask,
            past_key_values=cache,
            use_cache=True,
            layout=cache,
        )
        return self.model.head(out.last_hidden_state[:, -1]).float()


class Decoding:
    """The answers of one rollout: `step(token_ids)` appends a token to every row and returns the next logits; `select(rows)` drops
    rows. RuntimeError where another rollout has taken over its room."""

    def __init__(self, room: Room):
        room.rollouts += 1
        self.room, self.cache, self.rows, self._rollout = room, room.cache, len(room.position), room.rollouts

    def step(self, token_ids: Tensor) -> Tensor:
        """token_ids (N,) -> logits of the token after them, (N, V) float32, valid until the next step."""
        self._check()
        self.room.token_ids[: self.rows].copy_(token_ids)
        logits = self.room.logits(self.rows)
        self.room.position += 1
        self.cache.advance()
        return logits

    def select(self, rows: Tensor) -> None:
        """Keep these rows (M,) only; they ascend."""
        self._check()
        self.cache.select(rows)
        self.rows = len(rows)
        for places in (self.room.position, self.room.token_ids):
            places[: self.rows] = places[rows]

    def _check(self) -> None:
        if self._rollout != self.room.rollouts:
            raise RuntimeError("a later rollout decodes in the memory of this one")


class Rooms:
    """Those of a policy: `begin` after each prefill. `devices`: where steps are captured, by `capture`."""

    def __init__(self, capture: Capture = capture_on_cuda, devices: tuple[str, ...] = ("cuda",)):
        self.capture, self.devices = capture, devices
        self._rooms: OrderedDict[Hashable, Room] = OrderedDict()
        self._weights: list[Tensor] = []  # held, so that nothing else can come to lie where a graph reads

    def __deepcopy__(self, memo: Any) -> "Rooms":
        return Rooms(self.capture, self.devices)  # a copied policy has weights of its own

    def begin(
        self,
        model: LanguageModel,
        cache: RolloutCache,
        prompt_mask: Tensor,
        next_position: Tensor,
        num_answers: int,
        max_new_tokens: int,
    ) -> Decoding:
        """To decode G answers of at most so many tokens to each of the prompts with this mask (B, P), which `cache` has read;
        next_position (B,): that of their first tokens."""
        device, (B, P) = model.head_weight.device.type, prompt_mask.shape
        captured = device in self.devices and not model.waits and not casts_weights(model, device)
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if not captured or (autocast and _float32_weights(model)):
            cache.expand(prompt_mask, num_answers, max_new_tokens)
            return Decoding(Room(model, cache, next_position, self.capture if captured else None))
        weights = model.weights()
        if [weight.data_ptr() for weight in weights] != [weight.data_ptr() for weight in self._weights]:
            self._rooms.clear()
            self._weights = [weight.detach() for weight in weights]
        length = -(-P // LENGTHS) * LENGTHS
        kind = (B, num_answers, length, max_new_tokens, autocast, model.decoder.training)
        room = self._rooms.pop(kind, None)
        if room is None:
            cache.expand(prompt_mask, num_answers, max_new_tokens)
            cache.widen(length)
            room = Room(model, cache, next_position, self.capture)
        else:
            room.refill(cache, prompt_mask, next_position)
        self._rooms[kind] = room
        if len(self._rooms) > ROOMS:
            self._rooms.popitem(last=False)
        return Decoding(room)
