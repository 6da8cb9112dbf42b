"""Attention patterns: which query attends to which key.

A sequence is `text_len` text tokens followed by an image of `grid = (H, W)` tokens in raster order. In every pattern
every token attends to itself. In those with a name attention is causal, text attends to the text before it, and image
tokens attend to all text. Patterns differ in the image keys of an image query: one rule on two image positions, in
plain arithmetic that works on NumPy arrays, on tensors and in FlexAttention. Patterns are frozen and hashable; equal
patterns share their compiled plans.
"""

from __future__ import annotations

import functools
import hashlib
import operator
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, SupportsIndex, TypeVar

import numpy as np
import torch

from .compile import constant

Positions = TypeVar("Positions", np.ndarray, torch.Tensor)  # integer positions, or bools that mark allowed pairs


def _near(distance, size, radius):
    """Whether the cyclic `distance` modulo `size` is at most `radius`."""
    return (distance % size <= radius) | (-distance % size <= radius)


# rule(q, k, H, W, **options) on image positions, using only arithmetic, comparisons, & and |. Its result matters only
# for 0 <= k < q, so a rule need be neither causal nor allow a token to attend to itself.
def _row(q, k, H, W):
    return q - k <= W


def _column(q, k, H, W):
    return (q - k) % W == 0


def _conv_wrap(q, k, H, W, kernel):
    return ((q - k) // W <= kernel // 2) & _near(q - k, W, kernel // 2)


def _conv_clip(q, k, H, W, kernel):
    columns = q % W - k % W
    return (q // W - k // W <= kernel // 2) & (columns <= kernel // 2) & (-columns <= kernel // 2)


def _conv_torus(q, k, H, W, kernel):
    return _near(q // W - k // W, H, kernel // 2) & _near(q % W - k % W, W, kernel // 2)


def _axial_row(q, k, H, W):
    return q // W == k // W


def _corner_conv(q, k, H, W, kernel, dilation):
    rows, columns, reach = q // W - k // W, q % W - k % W, (kernel - 1) * dilation
    return (rows <= reach) & (columns >= 0) & (columns <= reach) & (rows % dilation == 0) & (columns % dilation == 0)


def _causal(q, k, H, W):
    return k <= q


_RULES = {
    "row": _row,
    "column": _column,
    "conv-wrap": _conv_wrap,
    "conv-clip": _conv_clip,
    "conv-torus": _conv_torus,
    "axial_row": _axial_row,
    "corner_conv": _corner_conv,
    "causal": _causal,
}


LAYOUTS = ("raster", "columns", "patches")
ROWS = 64  # of a mask that are read at a time
_CAUSAL_FIX = {
    "mask": "clear the entries above the diagonal (mask.tril()), or pass causal=False",
    "mask_mod": "return mask_mod(b, h, q_idx, kv_idx) & (kv_idx <= q_idx), or pass causal=False",
}
SHADES = " ░▒▓█"  # characters of a printed mask, by density


class _MaskRule:
    """The rule of a pattern given as a mask, in one bit per pair; compares by content and pickles compressed."""

    def __init__(self, bits: torch.Tensor, causal: bool):
        """`bits`: uint8 [N, ceil(N / 8)], a row per query; the first key has the lowest bit."""
        self.bits, self.causal = bits, causal
        self.digest = hashlib.sha256(bits.numpy().tobytes()).hexdigest()[:16]

    @classmethod
    def unpickled(cls, compressed: bytes, tokens: int, causal: bool) -> _MaskRule:
        bits = torch.frombuffer(bytearray(zlib.decompress(compressed)), dtype=torch.uint8)
        return cls(bits.view(tokens, -1), causal)

    def __reduce__(self) -> tuple:
        return self.unpickled, (zlib.compress(self.bits.numpy().tobytes()), len(self.bits), self.causal)

    def allowed(self, q: Positions, k: Positions) -> Positions:
        bits = self.bits.to(q.device) if isinstance(q, torch.Tensor) else self.bits.numpy()
        # pyrefly: ignore[bad-return]  # the result has the type of q
        return (bits[q, k // 8] >> (k % 8)) & 1 != 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _MaskRule) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


@dataclass(frozen=True)
class AttentionPattern:
    """A static attention pattern over `text_len + H * W` tokens. Use the constructors `row`, `column`, `conv`,
    `axial_row`, `corner_conv`, `causal`, `from_mask`, `from_mask_mod`.

    Attributes:
        name: the rule, as in the constructor.
        text_len: number of text tokens T >= 0 before the image.
        grid: image tokens as (H, W).
        options: the rule's parameters, as sorted (name, value) pairs.
        layout: the order of image tokens that packs the pattern into few tiles: "raster", "columns" (column by column)
            or "patches" (8 x 8 tokens, split into 4 x 8 and those into 2 x 8, so that 64, 32 or 16 consecutive tokens
            are neighbours).

    Raises:
        ValueError: text_len is below 0, the grid is empty, or the name or layout is unknown.
    """

    name: str
    text_len: int
    grid: tuple[int, int]
    options: tuple[tuple[str, int], ...] = ()
    layout: str = "raster"
    _mask: _MaskRule | None = field(default=None, repr=False)
    _order: bytes | None = field(default=None, repr=False)  # int64; bytes cache their hash, tuples do not

    def __post_init__(self) -> None:
        height, width = (_whole("grid", size) for size in self.grid)
        if _whole("text_len", self.text_len) < 0 or height < 1 or width < 1:
            raise ValueError(
                f"text_len must be at least 0 and the grid at least 1x1; got text_len={self.text_len}, grid={self.grid}"
            )
        if self._mask is None and self.name not in _RULES:
            raise ValueError(f"there is no pattern {self.name!r}; the patterns with a rule are {', '.join(_RULES)}")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout={self.layout!r} is not one of {', '.join(map(repr, LAYOUTS))}")

    # -- constructors

    @classmethod
    def _make(cls, name, text_len, grid, layout="raster", **options):
        try:
            height, width = (operator.index(size) for size in grid)
        except (TypeError, ValueError):
            raise ValueError(f"grid must be a pair (height, width) of whole numbers; got {grid!r}") from None
        text_len = _whole("text_len", text_len)
        return constant(cls, name, text_len, (height, width), tuple(sorted(options.items())), layout)

    @classmethod
    def row(cls, text_len: int, grid: tuple[int, int]) -> AttentionPattern:
        """The token itself and the previous W image tokens in raster order, across row ends (Ramesh et al. 2021, Fig.
        11a).
        """
        return cls._make("row", text_len, grid)

    @classmethod
    def column(cls, text_len: int, grid: tuple[int, int]) -> AttentionPattern:
        """The token itself and those above it in its column (Ramesh et al. 2021, Fig. 11b)."""
        return cls._make("column", text_len, grid, "columns")

    @classmethod
    def conv(
        cls, text_len: int, grid: tuple[int, int], kernel: int = 11, edge: Literal["wrap", "clip", "torus"] = "wrap"
    ) -> AttentionPattern:
        """A causal `kernel` x `kernel` neighbourhood.

        Args:
            text_len, grid: as in `AttentionPattern`.
            kernel: odd window size.
            edge: treatment of the image's edge. "wrap": the same raster distances for every query (Ramesh et al. 2021,
                Fig. 11d); "clip": the window is clipped (ruDALL-E v3); "torus": rows and columns wrap around (ruDALL-E
                v2).

        Raises:
            ValueError: the kernel is even or below 1, or the edge is unknown.
        """
        kernel = _whole("kernel", kernel)
        _check_odd("kernel", kernel)
        if edge not in ("wrap", "clip", "torus"):
            raise ValueError(f"edge={edge!r} is not one of 'wrap', 'clip', 'torus'")
        return cls._make(f"conv-{edge}", text_len, grid, "patches", kernel=kernel)

    @classmethod
    def axial_row(cls, text_len: int, grid: tuple[int, int]) -> AttentionPattern:
        """The token itself and those before it in its row (DALLE-pytorch's axial_row)."""
        return cls._make("axial_row", text_len, grid)

    @classmethod
    def corner_conv(cls, text_len: int, grid: tuple[int, int], kernel: int = 5, dilation: int = 1) -> AttentionPattern:
        """A `kernel` x `kernel` window with spacing `dilation` whose lower right corner is the query (DALLE-pytorch's
        conv_like).

        Raises:
            ValueError: `kernel` or `dilation` is below 1.
        """
        kernel, dilation = _whole("kernel", kernel), _whole("dilation", dilation)
        for name, value in (("kernel", kernel), ("dilation", dilation)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        return cls._make("corner_conv", text_len, grid, "patches", kernel=kernel, dilation=dilation)

    @classmethod
    def causal(cls, text_len: int, grid: tuple[int, int]) -> AttentionPattern:
        """All previous tokens: dense causal attention."""
        return cls._make("causal", text_len, grid)

    @classmethod
    def from_mask(
        cls,
        mask: torch.Tensor | np.ndarray,
        text_len: int = 0,
        order: Sequence[int] | torch.Tensor | None = None,
        *,
        causal: bool = True,
    ) -> AttentionPattern:
        """Any static mask.

        Args:
            mask: bool [N, N], True where the query (row) attends to the key (column), with a True diagonal.
            text_len: number of leading text tokens, which `DecodeCache` stores once per prompt. Nothing is added for
                them: the mask defines the keys of text, and which queries attend to text.
            order: a permutation of the N tokens (sequence of int) that places queries with similar keys next to each
                other; None: raster order.
            causal: whether to insist that no query attends to a later key. False also allows bidirectional attention;
                `DecodeCache` and the GPU kernels do not.

        Raises:
            ValueError: the mask is not such a matrix, text_len is out of range, or `order` is not a permutation.
            TypeError: text_len is not a whole number.

        The grid is (1, N - text_len); no operation needs another one.

        This call breaks a torch.compile graph, because it reads the mask; with fullgraph=True, create the pattern
        outside.
        """
        mask = torch.as_tensor(mask)
        if mask.ndim != 2 or mask.shape[0] != mask.shape[1] or mask.numel() == 0 or mask.dtype != torch.bool:
            raise ValueError(f"mask must be a bool matrix [N, N], N at least 1; got {mask.dtype} {list(mask.shape)}")
        return cls._from_rows("mask", lambda begin, end: mask[begin:end], len(mask), text_len, order, causal)

    @classmethod
    def from_mask_mod(
        cls,
        mask_mod: Callable[..., torch.Tensor],
        seq_len: int,
        *,
        text_len: int = 0,
        order: Sequence[int] | torch.Tensor | None = None,
        causal: bool = True,
    ) -> AttentionPattern:
        """The static mask of a FlexAttention mask_mod(b, h, q_idx, kv_idx). It is called with b = h = 0 and blocks of
        positions, so that no N x N tensor is made; the pattern keeps one bit per pair.

        Args:
            mask_mod: returns bool; every token attends to itself.
            seq_len: number of tokens N.
            text_len, order, causal, and what is raised: as in `from_mask`.
        """
        seq_len = _whole("seq_len", seq_len)
        if seq_len < 1:
            raise ValueError(f"seq_len must be at least 1; got {seq_len}")
        zero = torch.zeros((), dtype=torch.int64, device="cpu")
        tokens = torch.arange(seq_len, device="cpu")

        def rows(begin, end):
            queries = tokens[begin:end, None]
            allowed = mask_mod(zero, zero, queries, tokens[None])
            if not isinstance(allowed, torch.Tensor) or allowed.dtype != torch.bool:
                kind = allowed.dtype if isinstance(allowed, torch.Tensor) else type(allowed).__name__
                raise ValueError(f"mask_mod must return a bool tensor; got {kind}")
            return allowed.expand(len(queries), seq_len)

        return cls._from_rows("mask_mod", rows, seq_len, text_len, order, causal)

    @classmethod
    def _from_rows(cls, what, rows, n, text_len, order, causal):
        """The pattern of a mask, given by rows(begin, end) -> bool [end - begin, n]; `what` names it in errors."""
        text_len = _whole("text_len", text_len)
        if not 0 <= text_len < n:
            raise ValueError(f"text_len must lie in [0, {n - 1}] for a mask of {n} tokens; got {text_len}")
        if order is not None:
            order = [int(token) for token in order]
            if sorted(order) != list(range(n)):
                raise ValueError(f"order must be a permutation of the {n} tokens")
            order = np.array(order, np.int64).tobytes()
        bits, ahead, first = np.empty((n, -(-n // 8)), np.uint8), 0, (0, 0)
        for begin in range(0, n, ROWS):
            block = rows(begin, min(begin + ROWS, n)).cpu()
            later = block.triu(begin + 1)
            if not ahead and later.any():
                query, key = later.nonzero()[0].tolist()
                first = begin + query, key
            ahead += int(later.sum())
            blind = (~block.diagonal(begin)).nonzero()
            if len(blind):
                token = begin + blind[0, 0]
                raise ValueError(f"{what} excludes token {token} from its own keys; set the diagonal to True")
            bits[begin : begin + len(block)] = np.packbits(block.numpy(), axis=1, bitorder="little")
        if ahead and causal:
            raise ValueError(
                f"{what} is not causal: {ahead:,} pairs have a key after their query, the first of them query "
                f"{first[0]} and key {first[1]}; {_CAUSAL_FIX[what]}"
            )
        rule = _MaskRule(torch.from_numpy(bits), causal=not ahead)
        return cls("mask", text_len, (1, n - text_len), _mask=rule, _order=order)

    # -- queries

    @property
    def seq_len(self) -> int:
        """Number of tokens N = text_len + H * W."""
        return self.text_len + self.grid[0] * self.grid[1]

    @property
    def is_causal(self) -> bool:
        """Whether no query attends to a later key."""
        return self._mask is None or self._mask.causal

    @property
    def nnz(self) -> int:
        """Number of allowed (query, key) pairs."""
        return int(_block_counts(self, self.seq_len).sum())

    def sparsity(self) -> float:
        """The fraction of all N x N pairs that the pattern excludes, in [0, 1)."""
        return 1 - self.nnz / self.seq_len**2

    def __str__(self) -> str:
        """The mask as text of at most 32 x 32 characters, darker for denser blocks, with its density and the number of
        full, partial and empty 64 x 64 tiles in the order of `order()`. Fewer full and partial tiles are faster; the
        kernels' own tiles are smaller.
        """
        n, side = self.seq_len, -(-self.seq_len // 32)
        blocks = _block_counts(self, side)
        sizes = np.diff(np.r_[np.arange(0, n, side), n])
        density = blocks / np.outer(sizes, sizes)
        shades = ["".join(SHADES[int(np.ceil(x * (len(SHADES) - 1)))] for x in row) for row in density]
        tiles = _block_counts(self, 64, packed=True)
        sizes = np.diff(np.r_[np.arange(0, n, 64), n])
        full = int((tiles == np.outer(sizes, sizes)).sum())
        partial = int((tiles > 0).sum()) - full
        height, width = self.grid
        return "\n".join(
            [
                f"{self.name}: {self.text_len} text + {height} x {width} image tokens",
                *shades,
                f"{self.nnz:,} of {n**2:,} pairs ({100 * (1 - self.sparsity()):.1f} %); "
                f"{tiles.size} tiles of 64 x 64: {full} full, {partial} partial, {tiles.size - full - partial} empty",
            ]
        )

    def allowed(self, q: Positions, k: Positions) -> Positions:
        """Whether the queries at `q` attend to the keys at `k`.

        Args:
            q, k: absolute positions, two broadcastable integer arrays or tensors.

        Returns:
            bool, in the broadcast shape.
        """
        if self._mask is not None:
            return self._mask.allowed(q, k)
        text = self.text_len
        rule = _RULES[self.name](q - text, k - text, *self.grid, **dict(self.options))
        return (k == q) | ((k <= q) & ((k < text) | rule))

    def dense(self, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """Rows [begin, end) of the mask, by default all: bool [end - begin, N], one byte per pair."""
        end = self.seq_len if end is None else end
        return self.allowed(torch.arange(begin, end)[:, None], torch.arange(self.seq_len)[None, :])

    @property
    def mask_mod(self) -> Callable[..., torch.Tensor]:
        """The pattern as FlexAttention's mask_mod(b, h, q_idx, kv_idx)."""
        return lambda b, h, q_idx, kv_idx: self.allowed(q_idx, kv_idx)

    def order(self) -> torch.Tensor:
        """The permutation of the N tokens that packs the pattern into few tiles, int64 [N]: text, then the image tokens
        in the order of `layout`.
        """
        return self._in_order(self.layout)

    def decode_order(self) -> torch.Tensor:
        """The permutation in which the live keys of a decode step are contiguous, int64 [N]. Same as `order`, except
        that patches become raster order, because their keys are released row by row.
        """
        return self._in_order("raster" if self.layout == "patches" else self.layout)

    def _in_order(self, layout: str) -> torch.Tensor:
        if self._order is not None:
            return torch.frombuffer(bytearray(self._order), dtype=torch.int64)
        height, width = self.grid
        image = np.arange(height * width)  # NumPy: plans are compiled on the host, regardless of torch's default device
        if layout == "columns":
            image = image.reshape(height, width).T.reshape(-1)
        if layout == "patches":
            row, column = image // width, image % width
            image = np.lexsort((column, row, row // 2, row // 4, column // 8, row // 8))
        return torch.from_numpy(np.r_[: self.text_len, self.text_len + image])


def _whole(name: str, value: SupportsIndex) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number; got {value!r}") from None


def _check_odd(name: str, value: int) -> None:
    if value < 1 or value % 2 == 0:
        raise ValueError(f"{name} must be odd and at least 1; got {value}")


@functools.lru_cache(maxsize=256)
def _block_counts(pattern: AttentionPattern, side: int, packed: bool = False) -> np.ndarray:
    """Allowed pairs per side x side block, int64 [blocks, blocks]. `packed`: tokens are in the pattern's order."""
    n = pattern.seq_len
    tokens = (pattern.order().numpy() if packed else np.arange(n)).astype(np.int32)
    starts = np.arange(0, n, side)
    counts = np.zeros((len(starts), len(starts)), np.int64)
    for begin in range(0, n, 64):
        rows = pattern.allowed(tokens[begin : begin + 64, None], tokens[None, :])
        of_rows = np.add.reduceat(rows, starts, axis=1, dtype=np.int64)
        np.add.at(counts, np.arange(begin, begin + len(rows)) // side, of_rows)
    return counts
