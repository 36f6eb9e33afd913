"""What the engine asks of a vision-language model that is sampled from and trained.

`models/` implements it without knowing it, a recipe brings the two together, and mypy checks that they fit
(`tests/engine/rollout/test_policy.py`).

Letters: B prompts, G answers a prompt, N = B*G, P prompt tokens, T answer tokens, H hidden size, V vocabulary.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from PIL import Image
from torch import Tensor, device, nn

Message = dict[str, Any]  # of a chat: role, and content as text or as a list of texts and image places


class PromptBatch(Protocol):
    """B prompts with their images on the model's device, padded on the left."""

    @property
    def input_ids(self) -> Tensor:
        """(B, P)."""

    @property
    def attention_mask(self) -> Tensor:
        """(B, P), 0 where there is padding."""

    def __len__(self) -> int: ...

    def select(self, rows: list[int]) -> Self:
        """These prompts only."""


class DecodingState(Protocol):
    """N answers being decoded."""

    def step(self, token_ids: Tensor) -> Tensor:
        """token_ids (N,), appended to the answers -> logits of the tokens after them (N, V), float32."""

    def select(self, rows: Tensor) -> None:
        """Go on with these rows (M,) only."""


class Processor(Protocol):
    """Text and images to tokens and tensors, on the CPU. A data loader's workers call `encode`, so it can be pickled."""

    def encode(self, prompt: list[Message], images: Sequence[Image.Image], image_key: str | None = None) -> Any:
        """One prompt with its images, for `Policy.batch`. `image_key` identifies the images across steps."""

    def prompt_length(self, prompt: list[Message], image_sizes: Sequence[tuple[int, int] | None]) -> int:
        """Tokens of a prompt whose images have these (height, width) in pixels; None: as many as an image can have."""

    def own_token_in(self, prompt: list[Message]) -> str | None:
        """The first of the model's special tokens in a prompt's texts, or None: it would be read as a token, not as text."""

    def text_ids(self, text: str) -> list[int]:
        """The tokens of a text as a model would write it."""

    def answer_ids(self, texts: list[str]) -> list[list[int]]:
        """The same of answers, each with its end token."""

    def decode(self, ids: list[list[int]]) -> list[str]:
        """Texts without special tokens."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the files that transformers reads."""


Batch = TypeVar("Batch", bound=PromptBatch)


class Policy(Protocol[Batch]):
    """A vision-language model.

    `model(**policy.answer_inputs(batch, answer_ids), head=f)` returns `f(hidden (N, T, H), weight (V, H))`: the states that predict
    each answer token, and the language-model head.
    """

    @property
    def model(self) -> nn.Module:
        """The module that is optimised and saved: Hugging Face's, or that within PEFT."""

    @property
    def processor(self) -> Processor: ...

    @property
    def layers(self) -> nn.ModuleList:
        """The language model's repeated layers, which hold most of the weights; each call of `model` runs all of them."""

    @property
    def repeated_layers(self) -> Mapping[str, Iterable[nn.Module]]:
        """The layers that the model repeats, by the part of it that they are of, the vision tower too: what may be compiled."""

    @property
    def device(self) -> device:
        """Where the weights are, and where `batch` puts prompts."""

    @property
    def eos_token_ids(self) -> list[int]:
        """Every id that ends an answer."""

    @property
    def pad_token_id(self) -> int: ...

    @property
    def repetition_penalty(self) -> float:
        """What its answers are decoded with unless something else is asked for; 1: none."""

    def attend_by(self, provider: str) -> None:
        """Have rows of a prompt and its answers attend by one of `kernels.prefix_providers.PROVIDERS`."""

    def batch(self, encoded: list[Any]) -> Batch:
        """What `processor.encode` made of B prompts, on the model's device."""

    def prefill(self, batch: Batch, num_answers: int, max_new_tokens: int) -> tuple[DecodingState, Tensor]:
        """Read each prompt once -> (N answers to decode, logits of their first tokens (N, V))."""

    def answer_inputs(self, batch: Batch, answer_ids: Tensor) -> dict[str, Any]:
        """Keyword arguments for `model(...)`, see above; answer_ids (B, G, T)."""

    def reference(self) -> "Policy[Batch]":
        """The frozen policy that a KL term compares with: as this one is at present, whether a copy or seen through adapters."""

    def as_reference(self) -> AbstractContextManager:
        """Context in which `model(...)` computes with this policy's own weights."""

    @property
    def has_auxiliary_loss(self) -> bool:
        """Whether there is one, also before any forward."""

    def auxiliary_loss(self) -> Tensor | None:
        """What the last forward of `model(...)` asks to be added to any loss, such as the balance of its experts: a mean over
        tokens, a scalar. None: nothing."""

    def forget_images(self) -> None:
        """Drop kept image features: the weights have changed from outside."""


class GroundingPolicy(Policy[Batch], Protocol[Batch]):
    """One that draws a mask for each `<SEG>` of its answers."""

    @property
    def seg_token_id(self) -> int: ...

    def mask_logits(self, batch: Batch, states: Tensor, rows: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """states (M, H) that predict a `<SEG>`, each of the prompt rows[m] -> M mask logits [height, width], each of its image's
        size, float32, and the IoU (M,) that the model expects of them. It is called by `head`, within `model(...)`.

        Raises ValueError for a prompt without an image.
        """
