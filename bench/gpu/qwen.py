"""Checks and timings of Qwen2.5-VL's attention for bench.gpu: a decode step over a long cache, and the vision tower by windows.

The shapes are those of Qwen2.5-VL 3B with random weights: 36 layers, 16 query and 2 key heads of d = 128; 8 prompts of 700 tokens
with 8 answers each and room for 256 tokens. `ours` takes the query heads of a key head as rows and the windows of one length as a
batch; `eager` is transformers' SDPA: the cache expanded to every query head, a call a window. What a step must move is the cache
and the weights once, what it computes two FLOPs a weight and row and four an element of the keys and query head.
"""

from functools import partial

import torch
import torch.nn.functional as F
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from bench.measure import Check, TimedCase, Timing, relative_errors, training, without_grad
from models.decoder.decoding import Decoding
from models.decoder.kv_cache import RolloutCache
from models.decoder.shared_prefix import ATTENTION_NAME, shared_prefix_attention
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
    """One token more for every answer, again and again at the same place; `run(name)` by that attention implementation."""

    def __init__(self, device: torch.device, tiny: bool):
        self.model, self.prompts, self.answers = build_model(device, tiny, 1), 2 if tiny else 8, 2 if tiny else 8
        config, weight = self.model.config.text_config, self.model.lm_head.weight
        self.config, cache = self.model.model.language_model.config, RolloutCache(config.num_hidden_layers)
        for layer in cache.rollout_layers:
            shape = (self.prompts, config.num_key_value_heads, PROMPT, 128)
            layer.update(*(torch.randn(shape, device=device, dtype=weight.dtype) for _ in range(2)))
        mask = torch.ones(self.prompts, PROMPT, dtype=torch.long, device=device)
        position = torch.full((self.prompts,), PROMPT, device=device)
        self.state = Decoding(language_model(self.model), cache, mask, position, self.answers, ROOM, static=True)
        rows, keys = self.prompts * self.answers, PROMPT + ROOM
        weights = sum(parameter.numel() for parameter in self.model.model.language_model.parameters())
        cached = 2 * config.num_hidden_layers * rows * config.num_key_value_heads * keys * 128
        attention = 4 * config.num_hidden_layers * rows * config.num_attention_heads * keys * 128
        self.flops, self.bytes = 2 * rows * weights + attention, weight.element_size() * (weights + cached)

    @torch.no_grad()
    def run(self, name: str) -> torch.Tensor:
        self.config._attn_implementation = name
        self.state.cache.position.fill_(PROMPT)
        self.state.position.fill_(PROMPT)
        return self.state._forward()


def attention_inputs(device: torch.device, tiny: bool) -> tuple:
    """query (N, h, 1, d), key and value (N, k, keys, d) and mask of one layer; float32 on a CPU."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    rows, keys = (16 if tiny else 64), PROMPT + ROOM
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((rows, 16, 1, 128), (rows, 2, keys, 128), (rows, 2, keys, 128))
    states = [torch.randn(shape, device=device, generator=generator).to(dtype) for shape in shapes]
    return *states, torch.rand(rows, 1, 1, keys, device=device, generator=generator) > 0.3


def attention_functions(device: torch.device, tiny: bool):
    """The two ways through one layer's attention, ready to be called."""
    module = torch.nn.Module()
    module.num_key_value_groups = 8
    query, key, value, mask = attention_inputs(device, tiny)
    moved = (query.numel() * 2 + key.numel() + value.numel()) * query.element_size()
    flops = 4 * query.numel() * key.shape[2]
    ways = {"ours": shared_prefix_attention, "eager": sdpa_attention_forward}
    return {name: (lambda way=way: way(module, query, key, value, mask)[0]) for name, way in ways.items()}, flops, moved


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
    ours, theirs = (step.run(name) for name in (ATTENTION_NAME, "sdpa"))
    return relative_errors([ours], [theirs]).max().item(), 1e-5 if tiny else 2**-6


def _check_attention(device, tiny):
    functions, _, _ = attention_functions(device, tiny)
    query, key, value, mask = (x if x.dtype == torch.bool else x.double() for x in attention_inputs(device, tiny))
    key, value = (x.repeat_interleave(8, 1) for x in (key, value))
    exact = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)
    error, eager = (relative_errors([functions[name]().double()], [exact]).max().item() for name in ("ours", "eager"))
    return error, 2 * eager + 1e-6


def _check_tower(device, tiny):
    tower = Tower(device, tiny, _grids(tiny))
    results = []
    for name in (WINDOWS_NAME, "sdpa"):
        y = tower.run(name, tower.pixels)
        results.append([y.detach(), *torch.autograd.grad(y.float().square().mean(), tower.pixels)])
    return relative_errors(*results).max().item(), 1e-5 if tiny else 2**-5


def checks(device: torch.device, tiny: bool):
    """Ours against transformers'."""
    yield Check("decode attention, heads as rows", lambda: _check_attention(device, tiny))
    yield Check("decode step, heads as rows", lambda: _check_decode(device, tiny))
    yield Check("vision tower by window length", lambda: _check_tower(device, tiny))


def timings(device: torch.device, tiny: bool):
    """A layer's decode attention, a whole decode step, the vision tower forward and with its backward."""
    yield TimedCase("decode attention of a layer", lambda: Timing(*attention_functions(device, tiny), graphed=True), peers=False)
    yield TimedCase("decode step of all layers", partial(_decode_timing, device, tiny), peers=False)
    yield TimedCase("vision tower fwd", partial(_tower_timing, device, tiny, backward=False), peers=False)
    yield TimedCase("vision tower fwd and gradient of pixels", partial(_tower_timing, device, tiny, backward=True), peers=False)


def _decode_timing(device, tiny):
    """The cache read once by every key head, against expanded to every query head."""
    step, ways = DecodeStep(device, tiny), {"ours": ATTENTION_NAME, "eager": "sdpa"}
    providers = {name: partial(step.run, way) for name, way in ways.items()}
    return Timing(providers, step.flops, step.bytes, graphed=True)


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
