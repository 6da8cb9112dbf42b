"""The key-value cache of generation, one token at a time."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import autocast, backends
from .arguments import check_dtype, check_text_lengths, usable_device
from .backends.plans import schedule_tensor
from .compile import intercepted, lifted
from .decode_schedule import compile_schedule, compile_text_schedule
from .patterns import AttentionPattern
from .sharding import is_sharded


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
    text_schedule: torch.Tensor
    """The packed decode schedule of the text."""
    prefix_k: torch.Tensor
    """[P, H, T, D]"""
    prefix_v: torch.Tensor
    """[P, H, T, D]"""
    image_k: torch.Tensor
    """[P * C, H, S, D]"""
    image_v: torch.Tensor
    """[P * C, H, S, D]"""
    survivors: tuple[int, ...]
    """The given image tokens that are still in the cache when decoding begins, ascending."""
    start_tokens: torch.Tensor
    """The same on the device, int64."""
    start_slots: torch.Tensor
    """The slots of these tokens, int64."""


class DecodeCache:
    """The keys and values of `prompts * candidates` sequences that are generated together.

    The candidates of a prompt share its text keys. Of the image, a sequence keeps only the keys that later tokens still
    attend to. The step is a tensor on the device: addresses are stable and an image step has no host state, so it can
    be captured as a CUDA graph.

    The prefix, i.e. the text and the given image tokens, is stored by `prefill`, in one or more chunks. With one
    candidate per prompt, text can also be decoded one token at a time, to score or to complete a caption: while a layer
    holds less than the whole text, `decode_attention` computes the next text token. The position in the text is on the
    host, so text steps are neither captured as CUDA graphs nor compiled.

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
        self.text_len = text = patterns[0].text_len
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
        self._shape = torch.Size((prompts * candidates, heads, head_dim))
        with torch.inference_mode(False):  # ordinary tensors, writable in and outside inference mode
            self.step = torch.full((), start, dtype=torch.int64, device=device)
            self._layers = [self._layer(pattern) for pattern in patterns]
        self._held = [0] * len(patterns)  # tokens of the prefix in each layer
        self._in_text: set[int] = set()  # layers that decode a text token in this step

    def _layer(self, pattern):
        sequences, heads, head_dim = self._shape
        schedule = compile_schedule(pattern)
        survivors = schedule.surviving(self.start)

        def empty(*shape):
            return torch.empty(shape, dtype=self.dtype, device=self.device)

        prefix = self.prompts, heads, self.text_len, head_dim
        image = heads, sequences, schedule.slots, head_dim  # head-major: kernels read one head of all sequences
        real = torch.device("cpu") if intercepted() else self.device  # the device of fake tensors need not exist
        schedules = (schedule_tensor(pattern, real, compiler) for compiler in (compile_schedule, compile_text_schedule))
        packed, text_packed = lifted(*schedules)
        return CachedLayer(
            packed.to(self.device),
            text_packed.to(self.device),
            empty(*prefix),
            empty(*prefix),
            empty(*image).transpose(0, 1),
            empty(*image).transpose(0, 1),
            tuple(survivors.tolist()),
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

    @property
    def prefix_len(self) -> int:
        """Number of tokens before decoding: text_len + start."""
        return self.text_len + self.start

    def next_position(self, layer: int) -> int:
        """Position of the first token that the next `prefill` of a layer stores: the number of prefix tokens that it
        holds, or 0 if these are all.

        Raises:
            ValueError: no such layer.
        """
        self.layer(layer)
        return self._held[layer] % max(self.prefix_len, 1)

    def decodes_text(self, layer: int) -> bool:
        """Whether the next `decode_attention` of a layer computes a text token: there is one candidate per prompt, and
        the layer holds less than the whole text.
        """
        return self.candidates == 1 and self._held[layer] < self.text_len

    @torch.no_grad()
    def prefill(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Stores the keys and values of the next tokens of the prefix: the text, then the `start` given image tokens.
        A layer that holds the whole prefix begins a new one. No gradient flows through the cache.

        Args:
            layer: index of a layer.
            k, v: [P, H, n, D] in the cache's dtype, once per prompt; its candidates share them. All text_len + start
                tokens at once, or any number n of those that are left. torch.autocast casts them to the cache's dtype.

        Raises:
            ValueError, TypeError: no such layer, more tokens than are left, or a shape, device or dtype that differs
                from the cache's.
        """
        first, storage = self.next_position(layer), self.layer(layer)
        k, v = autocast.attention(k, v, dtype=self.dtype)
        tokens = k.shape[2] if k.ndim == 4 else self.prefix_len
        shape = torch.Size((self.prompts, self._shape[1], tokens, self._shape[2]))
        self._check_tensors(shape, "[prompts, heads, tokens, head_dim]", k=k, v=v)
        end, text = first + tokens, self.text_len
        if end > self.prefix_len:
            raise ValueError(
                f"k and v must hold at most {self.prefix_len - first} tokens, as layer {layer} has {first} of the "
                f"text_len + start = {self.prefix_len} prefix tokens; got {tokens} (for attention to the keys of "
                "another sequence, use scaled_dot_product_attention)"
            )
        new = slice(*(bisect_left(storage.survivors, position - text) for position in (first, end)))
        for prefix, image, x in ((storage.prefix_k, storage.image_k, k), (storage.prefix_v, storage.image_v, v)):
            prefix[:, :, first:end].copy_(x[:, :, : max(text - first, 0)])
            if end > text:
                of_prompts = image.unflatten(0, (self.prompts, self.candidates))
                given = x[:, None, :, storage.start_tokens[new] + (text - first)]
                of_prompts[:, :, :, storage.start_slots[new]] = given
        self._held[layer] = end
        self._in_text.discard(layer)

    def advance(self) -> None:
        """Moves on to the next token of the image, or of the text if `decode_attention` computed a text token; call it
        after `decode_attention` of every layer.

        Raises:
            ValueError: the image is complete (detected on a CPU only).
        """
        if not self._in_text:
            _advance(self.step, self._steps)
        for layer in self._in_text:
            self._held[layer] += 1
        self._in_text.clear()

    def reset(self, text: int | None = None) -> None:
        """Returns to the first step. The text stays in the cache; with `start` > 0, call `prefill` again.

        Args:
            text: number of text tokens to keep, after which `prefill` or the decoding of text continues; None: all, or
                with `start` > 0 none.

        Raises:
            ValueError: `text` is not in [0, text_len].
        """
        if text is None:
            text = 0 if self.start else self.text_len
        if not 0 <= text <= self.text_len:
            raise ValueError(f"text must lie in [0, {self.text_len}], the patterns' text_len; got {text}")
        self.step.fill_(self.start)
        self._held = [min(held, text) for held in self._held]

    def layer(self, layer: int) -> CachedLayer:
        """The tensors of a layer.

        Raises:
            ValueError: no such layer.
        """
        if not 0 <= layer < len(self._layers):
            raise ValueError(f"layer must lie in [0, {len(self._layers) - 1}]; got {layer}")
        return self._layers[layer]

    def begin_step(self, layer: int) -> tuple[torch.Tensor, ...]:
        """Begins or repeats the current step of a layer. Returns the operation's prefix_k, prefix_v, image_k, image_v,
        schedule and step; a text that is being decoded has the place of an image without text.
        """
        stored = self.layer(layer)
        if not self.decodes_text(layer):
            return stored.prefix_k, stored.prefix_v, stored.image_k, stored.image_v, stored.schedule, self.step
        self._in_text.add(layer)
        nothing = stored.prefix_k[:, :, :0]
        step = torch.full((), self._held[layer], dtype=torch.int64, device=self.device)
        return nothing, nothing, stored.prefix_k, stored.prefix_v, stored.text_schedule, step

    def check_step(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Checks that `layer` is ready for the q, k and v [P * C, H, D] of a new token.

        Raises:
            ValueError, TypeError: as `decode_attention`.
        """
        self.layer(layer)
        self._check_tensors(self._shape, "[prompts * candidates, heads, head_dim]", q=q, k=k, v=v)
        if self.decodes_text(layer):
            return
        held = self._held[layer]
        if held < self.prefix_len:
            hint = " (text can be decoded token by token with candidates=1 only)" if held < self.text_len else ""
            raise ValueError(
                f"layer {layer} holds {held} of the text_len + start = {self.prefix_len} prefix tokens; call "
                f"cache.prefill({layer}, k, v) with the others first{hint}"
            )
        # Only on a CPU is reading the step free, and it is impossible while tracing; the kernel checks again.
        readable = self.device.type == "cpu" and not torch.compiler.is_compiling() and not intercepted()
        if readable and int(self.step) >= self._steps:
            raise ValueError(_full(self._steps))

    def _check_tensors(self, shape, meaning, **tensors):
        if is_sharded(*tensors.values()):
            raise TypeError(f"{' and '.join(tensors)} must be plain tensors, as the cache's are; pass x.to_local()")
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
            raise TypeError(
                f"patterns must be AttentionPatterns; got {type(pattern).__name__} (AttentionPattern.from_mask makes "
                "one of a static mask; for masks that depend on data use scaled_dot_product_attention or FlexAttention)"
            )
        if not pattern.is_causal:
            raise ValueError("patterns must be causal, to generate one token after another; got one that is not")
    sizes = {(pattern.text_len, pattern.seq_len) for pattern in patterns}
    if len(sizes) > 1:
        raise ValueError(f"patterns must share text_len and seq_len; got the pairs {sorted(sizes)}")
