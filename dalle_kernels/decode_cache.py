"""The key-value cache of image generation, one token at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import autocast, backends
from .arguments import check_dtype, check_text_lengths, usable_device
from .backends.plans import schedule_tensor
from .compile import intercepted, lifted
from .decode_schedule import compile_schedule
from .patterns import AttentionPattern


@torch.library.custom_op("dalle_kernels::decode_advance", mutates_args=("step",))
def _advance(step: torch.Tensor, limit: int) -> None:
    """step += 1. On a CPU a complete image is an error; elsewhere checking would synchronise with the device."""
    if step.device.type == "cpu" and step >= limit:
        raise ValueError(_full(limit))
    step.add_(1)


@_advance.register_fake
def _(step, limit):
    return None


def _full(limit):
    return f"all {limit} tokens of the image have been decoded; call cache.reset() to start another"


@dataclass(frozen=True)
class CachedLayer:
    """The tensors of one layer: P prompts, C candidates, H heads, T text tokens, S slots, head dim D."""

    schedule: torch.Tensor
    """The packed decode schedule, int32; see `dalle_kernels.decode_schedule`."""
    prefix_k: torch.Tensor
    """[P, H, T, D]"""
    prefix_v: torch.Tensor
    """[P, H, T, D]"""
    image_k: torch.Tensor
    """[P * C, H, S, D]"""
    image_v: torch.Tensor
    """[P * C, H, S, D]"""
    start_tokens: torch.Tensor
    """The given image tokens that are still in the cache when decoding begins, int64."""
    start_slots: torch.Tensor
    """The slots of these tokens, int64."""


class DecodeCache:
    """The keys and values of `prompts * candidates` sequences that are generated together.

    The candidates of a prompt share its text keys. Of the image, a sequence keeps only the keys that later tokens still
    attend to. The step is a tensor on the device: addresses are stable and there is no host state, so a step can be
    captured as a CUDA graph.

    Args:
        patterns: one pattern per layer, all with the same text_len and image size.
        prompts, candidates: P and C; sequence p * C + c is candidate c of prompt p.
        heads, head_dim: H and D.
        dtype: dtype of the keys and values: float32, bfloat16, float16 or float64.
        device: device of the cache; None: torch's default device.
        start: number of given image tokens (of an image to complete); decoding begins after them.
        text_lengths: int64 [P] on the device, from 0 to text_len: how many text tokens of each prompt exist. Image
            tokens do not attend to the others. Every step reads the tensor, so it may be changed in place. None: all
            exist. "cuda" and "triton" do not support it.

    Raises:
        ValueError: a size is below 1, `start` is outside the image, the patterns differ in text_len or seq_len,
            PyTorch cannot use the device, or text_lengths has another shape, dtype, device or range.
        TypeError: dtype is not floating point, or `patterns` holds something else.
    """

    def __init__(
        self,
        patterns: Sequence[AttentionPattern],
        *,
        prompts: int,
        candidates: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        start: int = 0,
        text_lengths: torch.Tensor | None = None,
    ) -> None:
        patterns = list(patterns)
        _check_patterns(patterns)
        for name, size in dict(prompts=prompts, candidates=candidates, heads=heads, head_dim=head_dim).items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1; got {size}")
        check_dtype("dtype", dtype)
        text = patterns[0].text_len
        self._steps = patterns[0].seq_len - text
        if not 0 <= start < self._steps:
            raise ValueError(
                f"start must lie in [0, {self._steps - 1}] for an image of {self._steps} tokens; got {start}"
            )
        device = usable_device(device)
        if text_lengths is not None:
            check_text_lengths(text_lengths, prompts, text, device)
        self.prompts, self.candidates, self.dtype, self.start = prompts, candidates, dtype, start
        self.text_lengths = text_lengths
        self._prefix_shape = torch.Size((prompts, heads, text + start, head_dim))
        self._shape = torch.Size((prompts * candidates, heads, head_dim))
        with torch.inference_mode(False):  # ordinary tensors, writable in and outside inference mode
            self.step = torch.full((), start, dtype=torch.int64, device=device)
            self._layers = [self._layer(pattern) for pattern in patterns]
        self._prefilled = [False] * len(patterns)

    def _layer(self, pattern):
        prompts, heads, _, head_dim = self._prefix_shape
        schedule = compile_schedule(pattern)
        survivors = schedule.surviving(self.start)

        def empty(*shape):
            return torch.empty(shape, dtype=self.dtype, device=self.device)

        prefix = prompts, heads, pattern.text_len, head_dim
        image = heads, self._shape[0], schedule.slots, head_dim  # head-major: kernels read one head of all sequences
        real = torch.device("cpu") if intercepted() else self.device  # the device of fake tensors need not exist
        (packed,) = lifted(schedule_tensor(pattern, real))
        return CachedLayer(
            packed.to(self.device),
            empty(*prefix),
            empty(*prefix),
            empty(*image).transpose(0, 1),
            empty(*image).transpose(0, 1),
            torch.tensor(survivors, dtype=torch.int64, device=self.device),
            torch.tensor(schedule.steps[survivors, 0], dtype=torch.int64, device=self.device),
        )

    @property
    def device(self) -> torch.device:
        """Device of the cache."""
        return self.step.device

    @property
    def uses(self) -> tuple[str, ...]:
        """The options of the cache that only some backends support, in words."""
        return () if self.text_lengths is None else ("text_lengths",)

    @property
    def capturable(self) -> bool:
        """Whether a step can be captured as a CUDA graph. `reference` cannot: it reads the step on the host."""
        backend = backends.select("decode_attention", self._layers[0].image_k, uses=self.uses)
        return self.device.type == "cuda" and backend.capturable

    @torch.no_grad()
    def prefill(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Stores the keys and values of the text and of the `start` given image tokens. No gradient flows through the
        cache.

        Args:
            layer: index of a layer.
            k, v: [P, H, text_len + start, D] in the cache's dtype, once per prompt; its candidates share them.
                torch.autocast casts them to it.

        Raises:
            ValueError, TypeError: no such layer, or a shape, device or dtype that differs from the cache's.
        """
        storage = self.layer(layer)
        k, v = autocast.attention(k, v, dtype=self.dtype)
        self._check_tensors(self._prefix_shape, "[prompts, heads, text_len + start, head_dim]", k=k, v=v)
        text = storage.prefix_k.shape[2]
        for prefix, image, x in ((storage.prefix_k, storage.image_k, k), (storage.prefix_v, storage.image_v, v)):
            prefix.copy_(x[:, :, :text])
            if self.start:
                of_prompts = image.unflatten(0, (self.prompts, self.candidates))
                of_prompts[:, :, :, storage.start_slots] = x[:, None, :, text + storage.start_tokens]
        self._prefilled[layer] = True

    def advance(self) -> None:
        """Moves on to the next image token; call it after `decode_attention` of every layer.

        Raises:
            ValueError: the image is complete (detected on a CPU only).
        """
        _advance(self.step, self._steps)

    def reset(self) -> None:
        """Returns to the first step. The text stays in the cache; with `start` > 0, call `prefill` again."""
        self.step.fill_(self.start)
        if self.start:
            self._prefilled = [False] * len(self._layers)

    def layer(self, layer: int) -> CachedLayer:
        """The tensors of a layer.

        Raises:
            ValueError: no such layer.
        """
        if not 0 <= layer < len(self._layers):
            raise ValueError(f"layer must lie in [0, {len(self._layers) - 1}]; got {layer}")
        return self._layers[layer]

    def check_step(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Checks that `layer` is ready for the q, k and v [P * C, H, D] of a new token.

        Raises:
            ValueError, TypeError: as `decode_attention`.
        """
        self.layer(layer)
        self._check_tensors(self._shape, "[prompts * candidates, heads, head_dim]", q=q, k=k, v=v)
        if not self._prefilled[layer] and self._prefix_shape[2]:
            raise ValueError(f"layer {layer} has no prefix yet; call cache.prefill({layer}, k, v) first")
        # Only on a CPU is reading the step free, and it is impossible while tracing; the kernel checks again.
        readable = self.device.type == "cpu" and not torch.compiler.is_compiling() and not intercepted()
        if readable and int(self.step) >= self._steps:
            raise ValueError(_full(self._steps))

    def _check_tensors(self, shape, meaning, **tensors):
        for name, x in tensors.items():
            if x.shape != shape:
                raise ValueError(f"{name} must be {meaning} = {list(shape)}; got {list(x.shape)}")
            if x.dtype != self.dtype:
                raise TypeError(f"{name} must have the cache's dtype {self.dtype}; got {x.dtype}")
            if x.device != self.device:
                raise ValueError(f"{name} must be on the cache's device {self.device}; got {x.device}")


def _check_patterns(patterns):
    if not patterns:
        raise ValueError("patterns must hold one pattern per layer; got none")
    for pattern in patterns:
        if not isinstance(pattern, AttentionPattern):
            raise TypeError(f"patterns must be AttentionPatterns; got {type(pattern).__name__}")
        if not pattern.is_causal:
            raise ValueError("patterns must be causal, to generate one token after another; got one that is not")
    sizes = {(pattern.text_len, pattern.seq_len) for pattern in patterns}
    if len(sizes) > 1:
        raise ValueError(f"patterns must share text_len and seq_len; got the pairs {sorted(sizes)}")
