"""The prior: a sparse transformer over a caption and the codes of its picture (Ramesh et al. 2021, App. B)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dalle_kernels as dk
from dalle import config as configs
from dalle.errors import UserError
from dalle_kernels.decode_schedule import compile_schedule

TEXT_WEIGHT, IMAGE_WEIGHT = 1 / 8, 7 / 8  # of the two cross-entropies (section 2.2)
IGNORE = -100  # target of a position that does not count
LOGIT_COPIES = 6  # float32 copies of a step's logits that sampling may hold at once: sorted, with indices, cumulated
RESIDUAL_COPIES = 16  # of the residual stream, for a block's input, queries, keys, values and MLP


@dataclass(frozen=True)
class PriorConfig:
    """Size of a prior. The width of the model is `heads * head_dim`."""

    text_len: int
    """Text positions, the start token's included: a caption may have up to text_len - 1 tokens."""
    text_vocab: int
    """Number of text tokens."""
    grid: tuple[int, int]
    """Rows and columns of image codes."""
    image_vocab: int
    """Number of image codes."""
    layers: int
    """Residual blocks of attention and MLP."""
    heads: int
    """Attention heads."""
    head_dim: int = 64
    """Channels of a head."""
    conv_kernel: int = 11
    """Side of the window of the last, convolutional layer; odd."""

    def __post_init__(self):
        if min(self.text_vocab, *self.grid, self.image_vocab, self.layers, self.heads, self.head_dim) < 1:
            raise UserError(f"every size of a prior must be at least 1, not {self}")
        if len(self.grid) != 2 or self.text_len < 2:
            raise UserError(f"a prior needs a grid of two sides and text_len >= 2, not {self.grid}, {self.text_len}")
        if self.conv_kernel < 1 or self.conv_kernel % 2 == 0:
            raise UserError(f"conv_kernel must be odd, not {self.conv_kernel}")

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return self.heads * self.head_dim

    @property
    def image_len(self) -> int:
        """Image positions: one for each code."""
        return self.grid[0] * self.grid[1]

    @property
    def start_id(self) -> int:
        """Text id of the start token, which fills position 0; as a target the same number means "end of text"."""
        return self.text_vocab

    def schedule(self) -> list[dk.AttentionPattern]:
        """A pattern for each layer: row, column, row, row, and so on, the last convolutional (App. B.1).

        Layer i = 1, 2, ..., layers - 1 is column if (i - 2) % 4 == 0, and otherwise row.
        """
        row = dk.AttentionPattern.row(text_len=self.text_len, grid=self.grid)
        column = dk.AttentionPattern.column(text_len=self.text_len, grid=self.grid)
        conv = dk.AttentionPattern.conv(text_len=self.text_len, grid=self.grid, kernel=self.conv_kernel)
        return [column if (i - 2) % 4 == 0 else row for i in range(1, self.layers)] + [conv]

    @classmethod
    def preset(cls, name: str) -> PriorConfig:
        """A named size; "tiny" and "small" go with the dVAEs of these names, "dalle-12b" is the published one."""
        return configs.preset(PRESETS, name)


PRESETS = {
    "tiny": PriorConfig(32, 1024, (8, 8), 512, layers=6, heads=6, head_dim=32, conv_kernel=5),
    "small": PriorConfig(48, 2048, (16, 16), 1024, layers=12, heads=4, conv_kernel=7),
    "medium": PriorConfig(128, 16384, (16, 16), 4096, layers=16, heads=8, conv_kernel=7),
    "dalle-2.8b": PriorConfig(256, 16384, (32, 32), 8192, layers=64, heads=30),
    "dalle-5.6b": PriorConfig(256, 16384, (32, 32), 8192, layers=64, heads=42),
    "dalle-12b": PriorConfig(256, 16384, (32, 32), 8192, layers=64, heads=62),
}


class Layer(nn.Module):
    """Pre-norm residual block: sparse attention, then an MLP four times as wide."""

    def __init__(self, width: int, heads: int, pattern: dk.AttentionPattern):
        super().__init__()
        self.heads, self.pattern = heads, pattern
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, cache: dk.DecodeCache | None = None, index: int = 0) -> Tensor:
        """[B, N, width] to the same; a cache, if given, takes the keys and values as prefix of layer `index`."""
        q, k, v = self._heads(x)
        if cache is not None:
            cache.prefill(index, k, v)
        return self._finish(x, dk.sparse_attention(q, k, v, self.pattern).transpose(1, 2))

    def step(self, x: Tensor, cache: dk.DecodeCache, index: int) -> Tensor:
        """One new image token of every sequence, [R, width], against the cache."""
        q, k, v = (t[:, :, 0] for t in self._heads(x[:, None]))
        return self._finish(x, dk.decode_attention(q, k, v, cache, index))

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv(self.attention_norm(x))
        return qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.attention_out(attended.flatten(-2))
        return x + self.mlp_out(gelu(self.mlp_in(self.mlp_norm(x))))


def fit_text(ids: Sequence[int], vocab: int, room: int, truncate: bool, reader: str) -> Tensor:
    """Token ids of a caption as int64 [n], n <= room.

    Raises:
        UserError: there are more than `room`, all that `reader` reads, and `truncate` is off; or one is out of range.
    """
    if len(ids) > room and not truncate:
        raise UserError(
            f"the caption has {len(ids)} tokens and {reader} reads at most {room}: "
            "shorten it or have it cut (--truncate)"
        )
    if bad := [i for i in ids if not 0 <= i < vocab]:
        raise UserError(f"text id {bad[0]} is not in the vocabulary of {vocab} tokens")
    return torch.as_tensor(ids[:room], dtype=torch.int64)


def gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the approximation of Child et al. 2019."""
    return F.silu(1.702 * x) / 1.702


class Prior(nn.Module):
    """Autoregressive transformer over [text_len text positions, then the picture's codes in raster order].

    Position p holds its own token and predicts the one at p + 1: position 0 holds the start token, text positions
    predict text, the last text position and the image positions predict codes; all positions are fed in training and
    the last output goes unused. Text is int64 [B, text_len] as `pack_text` lays it out: unused positions hold learned
    pads, one per position, which are attended to like any token.
    """

    def __init__(self, config: PriorConfig):
        super().__init__()
        self.config = config
        width, (rows, columns) = config.width, config.grid
        # Rows: the text tokens, the start token, a pad for each position.
        self.text_embedding = nn.Embedding(config.text_vocab + 1 + config.text_len, width)
        self.text_position = nn.Embedding(config.text_len, width)
        self.image_embedding = nn.Embedding(config.image_vocab, width)
        self.row_embedding = nn.Embedding(rows, width)
        self.column_embedding = nn.Embedding(columns, width)
        self.layers = nn.ModuleList(Layer(width, config.heads, pattern) for pattern in config.schedule())
        self.norm = nn.LayerNorm(width)
        self.text_head = nn.Linear(width, config.text_vocab + 1)
        self.image_head = nn.Linear(width, config.image_vocab)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights and embeddings ~ N(0, 0.02), those that write to the residual stream scaled by 1/sqrt(2 layers)."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for layer in self.layers:
            for linear in (layer.attention_out, layer.mlp_out):
                nn.init.normal_(linear.weight, std=0.02 / (2 * len(self.layers)) ** 0.5)

    def pack_text(self, captions: Sequence[Sequence[int]], truncate: bool = False) -> Tensor:
        """Token ids of captions as int64 [B, text_len]: the start token, the ids, then each position's own pad.

        Raises:
            UserError: a caption has more than text_len - 1 tokens and `truncate` is off, or an id is out of range.
        """
        vocab, room = self.config.text_vocab, self.config.text_len - 1
        text = torch.arange(vocab + 1, vocab + 1 + self.config.text_len).repeat(len(captions), 1)
        text[:, 0] = self.config.start_id
        for row, ids in zip(text, captions, strict=True):
            ids = fit_text(ids, vocab, room, truncate, "the model")
            row[1 : 1 + len(ids)] = ids
        return text.to(self.text_embedding.weight.device)

    def forward(self, text: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Logits in float32: text [B, text_len - 1, text_vocab + 1], image [B, n + 1, image_vocab].

        Args:
            text: int64 [B, text_len], from `pack_text`.
            codes: the first n codes of each picture in raster order, int64 [B, n], 0 <= n <= rows * columns. Image
                logit i predicts code i; with all codes given the one after the last is left out, so n logits come.
        """
        hidden = self._run(text, codes)
        end = self.config.text_len - 1
        text_hidden, image_hidden = hidden[:, :end], hidden[:, end : end + self.config.image_len]
        return self._logits(self.text_head, text_hidden), self._logits(self.image_head, image_hidden)

    def loss(self, text: Tensor, codes: Tensor) -> dict[str, Tensor]:
        """Cross-entropies of a batch of captions [B, text_len] and all codes of their pictures [B, rows * columns].

        Each is the mean over its own tokens, in nats. The text counts a caption's tokens and the first pad after it,
        which stands for "end of text" whatever its position; further pads would teach nothing and are ignored.

        Returns:
            "loss": 1/8 text + 7/8 image, differentiable; "text", "image": detached.
        """
        if codes.shape[1] != self.config.image_len:
            raise UserError(f"a picture has {self.config.image_len} codes, not {codes.shape[1]}")
        text_logits, image_logits = self(text, codes)
        text_loss = F.cross_entropy(text_logits.flatten(0, 1), self.text_targets(text).flatten(), ignore_index=IGNORE)
        image_loss = F.cross_entropy(image_logits.flatten(0, 1), codes.flatten())
        loss = TEXT_WEIGHT * text_loss + IMAGE_WEIGHT * image_loss
        return {"loss": loss, "text": text_loss.detach(), "image": image_loss.detach()}

    def text_targets(self, text: Tensor) -> Tensor:
        """What positions 0 to text_len - 2 should predict, int64 [B, text_len - 1]; IGNORE after the end of text."""
        targets = text[:, 1:].clamp(max=self.config.start_id)
        ended = (targets == self.config.start_id).cumsum(1)
        return targets.masked_fill(ended > 1, IGNORE)

    def generate(
        self,
        text: Tensor,
        *,
        candidates: int = 1,
        seeds: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        given: Tensor | None = None,
        redraw: Tensor | None = None,
    ) -> Tensor:
        """Draw the codes of `candidates` pictures for every caption.

        A caption is run once, whatever the number of its candidates; then every step feeds one code per picture
        through the decode cache. Of a given picture the codes before the first one to redraw are run with the caption,
        and later ones are fed in their turn in place of a draw, so all that follows is conditioned on them.

        Args:
            text: captions, int64 [P, text_len], from `pack_text`.
            candidates: pictures per caption, C.
            seeds: int64 [P * C], one per picture, in the order p * C + c; None draws them. A picture depends on its
                seed and caption, not on the others in the batch.
            temperature, top_k, top_p: see `dalle_kernels.sample_tokens`.
            given: the codes of a picture for each caption, int64 [P, rows, columns] or [P, rows * columns].
            redraw: which codes of the given pictures to draw anew, bool [rows, columns], the last one among them: what
                comes after all that is drawn conditions nothing.

        Returns:
            Codes, int64 [P * C, rows, columns].

        Raises:
            UserError: counts, shapes or dtypes are wrong, or `redraw` does not reach the end of the picture.
        """
        config = self.config
        if candidates < 1:
            raise UserError(f"candidates must be at least 1, not {candidates}")
        count = len(text) * candidates
        if seeds is None:
            seeds = torch.randint(2**62, (count,), device=text.device)
        if seeds.shape != (count,):
            raise UserError(f"there must be {count} seeds, one per picture, not {list(seeds.shape)}")
        given, drawn = self._check_given(given, redraw, text)
        start = drawn.index(True)

        codes = given.repeat_interleave(candidates, 0)
        drawn = torch.tensor(drawn, device=codes.device)
        with torch.inference_mode():
            cache = self._cache(len(text), candidates, start)
            place = cache.step.view(1)  # the same memory: it moves on with the cache
            offset = cache.step.expand(count)

            def draw(hidden: Tensor) -> None:
                logits = self._logits(self.image_head, hidden)
                new = dk.sample_tokens(
                    logits, temperature=temperature, top_k=top_k, top_p=top_p, seed=seeds, offset=offset
                )
                kept = codes.index_select(1, place)
                codes.index_copy_(1, place, torch.where(drawn.index_select(0, place), new[:, None], kept))

            def step() -> None:
                draw(self._step(codes.index_select(1, place), place, cache))

            draw(self._run(text, given[:, :start], cache)[:, -1].repeat_interleave(candidates, 0))
            steps = config.image_len - 1 - start
            if cache.capturable and steps > 1:
                _replay(step, steps, cache.device)
            else:
                for _ in range(steps):
                    step()
        return codes.unflatten(1, config.grid)

    def sequence_bytes(self, candidates: int) -> int:
        """About how much memory each of `candidates` pictures of a caption takes in `generate`, in bytes.

        Its keys and values in the decode cache and its logits; of the caption, which they share, the keys and values
        and what running it takes.
        """
        config, weight = self.config, self.text_embedding.weight.element_size()
        key_and_value = 2 * config.width * weight
        slots = sum(compile_schedule(layer.pattern).slots for layer in self.layers)
        picture = slots * key_and_value + LOGIT_COPIES * 4 * config.image_vocab
        caption = config.text_len * (len(self.layers) * key_and_value + RESIDUAL_COPIES * config.width * weight)
        return picture + caption // candidates

    def _check_given(self, given: Tensor | None, redraw: Tensor | None, text: Tensor) -> tuple[Tensor, list[bool]]:
        """Codes [P, rows * columns], and for each whether it is drawn."""
        config, shape = self.config, (len(text), *self.config.grid)
        if (given is None) != (redraw is None):
            raise UserError("given codes and what of them to redraw go together: give both or neither")
        if given is None:
            return text.new_zeros(len(text), config.image_len), [True] * config.image_len
        if given.dtype != torch.int64 or given.shape not in (shape, (len(text), config.image_len)):
            raise UserError(f"given codes must be int64 {list(shape)}, not {_kind(given)}")
        if redraw.dtype != torch.bool or redraw.shape != config.grid:
            raise UserError(f"what to redraw must be bool {list(config.grid)}, not {_kind(redraw)}")
        given, drawn = given.flatten(1).to(text.device), redraw.flatten().cpu()
        if not drawn.any():
            raise UserError("what to redraw is empty, so there is nothing to draw: mark the codes to draw anew")
        if not drawn[-1]:
            raise UserError(
                "what to redraw must reach the end of the picture, its bottom right corner: "
                "codes are drawn in reading order and cannot heed what comes after them"
            )
        kept = given[:, ~drawn]
        if kept.numel() and not 0 <= int(kept.min()) <= int(kept.max()) < config.image_vocab:
            raise UserError(
                f"given codes must be in [0, {config.image_vocab}), not {int(kept.min())} to {int(kept.max())}"
            )
        return given, drawn.tolist()

    def _cache(self, prompts: int, candidates: int, start: int) -> dk.DecodeCache:
        weights = self.text_embedding.weight
        device = weights.device
        autocast = torch.is_autocast_enabled(device.type)
        return dk.DecodeCache(
            [layer.pattern for layer in self.layers],
            prompts=prompts,
            candidates=candidates,
            heads=self.config.heads,
            head_dim=self.config.head_dim,
            dtype=torch.get_autocast_dtype(device.type) if autocast else weights.dtype,
            device=device,
            start=start,
        )

    def _run(self, text: Tensor, codes: Tensor, cache: dk.DecodeCache | None = None) -> Tensor:
        """Hidden states of all text positions and the given codes, [B, text_len + n, width]."""
        config = self.config
        if text.ndim != 2 or text.shape[1] != config.text_len:
            raise UserError(f"text must be [B, {config.text_len}], as pack_text lays it out, not {list(text.shape)}")
        if codes.ndim != 2 or codes.shape[1] > config.image_len or len(codes) != len(text):
            raise UserError(f"codes must be [{len(text)}, at most {config.image_len}], not {list(codes.shape)}")
        places = torch.arange(codes.shape[1], device=codes.device)
        x = torch.cat([self.text_embedding(text) + self.text_position.weight, self._embed_codes(codes, places)], 1)
        for i, layer in enumerate(self.layers):
            x = layer(x, cache, i)
        return x

    def _step(self, code: Tensor, place: Tensor, cache: dk.DecodeCache) -> Tensor:
        """Hidden state of every sequence's code [R, 1] at `place` [1], [R, width]; the cache goes on to the next."""
        x = self._embed_codes(code, place)[:, 0]
        for index, layer in enumerate(self.layers):
            x = layer.step(x, cache, index)
        cache.advance()
        return x

    def _embed_codes(self, codes: Tensor, places: Tensor) -> Tensor:
        """Codes [B, n] at `places` [n] of the picture, [B, n, width]."""
        columns = self.config.grid[1]
        position = self.row_embedding(places // columns) + self.column_embedding(places % columns)
        return self.image_embedding(codes) + position

    def _logits(self, head: nn.Linear, hidden: Tensor) -> Tensor:
        # Logits in 16 bits shift the loss (App. D), so the heads stay in float32 under autocast.
        with torch.autocast(hidden.device.type, enabled=False):
            return head(self.norm(hidden).to(head.weight.dtype)).float()


def _replay(step: Callable[[], None], times: int, device: torch.device) -> None:
    """Runs `step`, which keeps all that changes on the device, `times` times: once as it is, then as a CUDA graph.

    The first run prepares what a capture must not: kernels are loaded, and autocast keeps its copies of the weights
    in ordinary memory, from where the graph reads them.
    """
    caller, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(caller)
    with torch.cuda.stream(stream):
        step()
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do with the device meanwhile, such as loading data, is no error
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            step()  # recorded, not run
        for _ in range(times - 1):
            graph.replay()
    caller.wait_stream(stream)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
