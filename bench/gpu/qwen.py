"""Checks and timings of Qwen2.5-VL for bench.gpu: a decode step of all layers, and the vision tower by windows.

The shapes are those of Qwen2.5-VL 3B with random weights: 36 layers, 16 query and 2 key heads of d = 128; 8 prompts of 700 tokens
with 8 answers each. `ours` has one copy of a prompt's keys and takes the windows of one length as a batch; `eager` is transformers'
SDPA: a cache that holds a prompt for every answer, and a call a window. What a step must move is the prompts' keys and the weights
once, what it computes two FLOPs a weight and row and four an element of the keys and query head.
"""

from functools import partial

import torch
from transformers import DynamicCache, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from bench.measure import Check, TimedCase, Timing, relative_errors, training, without_grad
from models.decoder.decoding import Rooms
from models.decoder.kv_cache import RolloutCache
from models.decoder.shared_prefix import attend_by_prefix
from models.qwen.policy import language_model
from models.qwen.vision_windows import WINDOWS_NAME

PROMPT, ROOM = 700, 256
PATCH_FEATURES = 3 * 2 * 14 * 14


def build_model(device: torch.device, tiny: bool, vision_depth: int) -> Qwen2_5_VLForConditionalGeneration:
    """A random Qwen2.5-VL of 3B's shape in bfloat16, or one of the same heads in two narrow layers in float32."""
    layers, hidden = (2, 512) if tiny else (36, 2048)
    text = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden if tiny else 11008,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": 2,
        "vocab_size": 1000 if tiny else 151936,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
    }
    vision = {"depth": vision_depth, "out_hidden_size": hidden, "fullatt_block_indexes": [vision_depth - 1]}
    vision |= {"hidden_size": 160, "num_heads": 2, "intermediate_size": 320} if tiny else {}
    # The default ids of its special tokens lie beyond a small vocabulary
    tokens = dict.fromkeys(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"), 1)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **tokens)
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration(config).to(torch.float32 if tiny else torch.bfloat16).eval()
    return model.requires_grad_(False)


class DecodeStep:
    """One token more for every answer, again and again at the same place: `ours` and `eager`."""

    def __init__(self, device: torch.device, tiny: bool):
        self.model, self.prompts, self.answers = build_model(device, tiny, 1), 2 if tiny else 8, 2 if tiny else 8
        config, weight = self.model.config.text_config, self.model.lm_head.weight
        self.config, cache = self.model.model.language_model.config, RolloutCache(config.num_hidden_layers)
        self.expanded = DynamicCache(config=config)
        for index, layer in enumerate(cache.rollout_layers):
            shape = (self.prompts, config.num_key_value_heads, PROMPT, 128)
            states = [torch.randn(shape, device=device, dtype=weight.dtype) for _ in range(2)]
            layer.update(*states)
            self.expanded.update(*(x.repeat_interleave(self.answers, 0) for x in states), index)
        mask = torch.ones(self.prompts, PROMPT, dtype=torch.long, device=device)
        position = torch.full((self.prompts,), PROMPT, device=device)
        self.state = Rooms(devices=()).begin(language_model(self.model), cache, mask, position, self.answers, ROOM)
        rows = self.prompts * self.answers
        self.token_ids = torch.zeros(rows, dtype=torch.long, device=device)
        weights = sum(parameter.numel() for parameter in self.model.model.language_model.parameters())
        cached = 2 * config.num_hidden_layers * self.prompts * config.num_key_value_heads * PROMPT * 128
        attention = 4 * config.num_hidden_layers * rows * config.num_attention_heads * PROMPT * 128
        self.flops, self.bytes = 2 * rows * weights + attention, weight.element_size() * (weights + cached)

    @torch.no_grad()
    def ours(self) -> torch.Tensor:
        attend_by_prefix(self.config)
        self.state.cache.position.zero_()
        self.state.room.position.fill_(PROMPT)
        return self.state.step(self.token_ids)

    @torch.no_grad()
    def eager(self) -> torch.Tensor:
        self.config._attn_implementation = "sdpa"
        self.state.room.position.fill_(PROMPT)
        out = self.model.model.language_model(
            inputs_embeds=self.model.get_input_embeddings()(self.token_ids[:, None]),
            position_ids=self.state.room.position[:, None].expand(3, -1, 1),
            attention_mask={"full_attention": None},
            past_key_values=self.expanded,
            use_cache=True,
        )
        self.expanded.crop(-1)
        return self.model.lm_head(out.last_hidden_state[:, -1]).float()


class Tower:
    """The vision tower over images of these grids, in patches; `run(name, pixels)` by that attention implementation."""

    def __init__(self, device: torch.device, tiny: bool, grids: list[tuple[int, int]]):
        self.tower = build_model(device, tiny, 2 if tiny else 32).model.visual
        self.grids = torch.tensor([(1, *grid) for grid in grids])
        patches = int(self.grids.prod(1).sum())
        dtype = self.tower.patch_embed.proj.weight.dtype
        self.pixels = torch.randn(patches, PATCH_FEATURES, device=device).to(dtype).requires_grad_()
        weights = sum(parameter.numel() for parameter in self.tower.parameters())
        self.flops, self.bytes = 2 * patches * weights, weights * dtype.itemsize

    def run(self, name: str, pixels: torch.Tensor) -> torch.Tensor:
        self.tower.config._attn_implementation = name
        return self.tower(pixels, self.grids).pooler_output


def _grids(tiny: bool) -> list[tuple[int, int]]:
    """Whole windows and ragged ones; 1.2 megapixels."""
    return [(16, 24), (18, 30)] if tiny else [(64, 64), (54, 74)]


def _check_decode(device, tiny):
    step = DecodeStep(device, tiny)
    return relative_errors([step.ours()], [step.eager()]).max().item(), 1e-5 if tiny else 2**-6


def _check_tower(device, tiny):
    tower = Tower(device, tiny, _grids(tiny))
    results = []
    for name in (WINDOWS_NAME, "sdpa"):
        y = tower.run(name, tower.pixels)
        results.append([y.detach(), *torch.autograd.grad(y.float().square().mean(), tower.pixels)])
    return relative_errors(*results).max().item(), 1e-5 if tiny else 2**-5


def checks(device: torch.device, tiny: bool):
    """Ours against transformers'."""
    yield Check("decode step over one copy of a prompt", lambda: _check_decode(device, tiny))
    yield Check("vision tower by window length", lambda: _check_tower(device, tiny))


def timings(device: torch.device, tiny: bool):
    """A whole decode step, the vision tower forward and with its backward."""
    yield TimedCase("decode step of all layers", partial(_decode_timing, device, tiny), peers=False)
    yield TimedCase("vision tower fwd", partial(_tower_timing, device, tiny, backward=False), peers=False)
    yield TimedCase("vision tower fwd and gradient of pixels", partial(_tower_timing, device, tiny, backward=True), peers=False)


def _decode_timing(device, tiny):
    """The prompts' keys read once, against once an answer and query head."""
    step = DecodeStep(device, tiny)
    return Timing({"ours": step.ours, "eager": step.eager}, step.flops, step.bytes, graphed=True)


def _tower_timing(device, tiny, backward):
    tower, ways = Tower(device, tiny, _grids(tiny)), {"ours": WINDOWS_NAME, "eager": "sdpa"}
    if not backward:
        runs = {name: partial(without_grad, tower.run, way, tower.pixels) for name, way in ways.items()}
        return Timing(runs, tower.flops, tower.bytes)
    seed = torch.ones_like(without_grad(tower.run, WINDOWS_NAME, tower.pixels))
    runs = {
        name: training(lambda pixels, way=way: tower.run(way, pixels), [tower.pixels], grad_output=seed)
        for name, way in ways.items()
    }
    return Timing(runs, 2 * tower.flops, 2 * tower.bytes)
