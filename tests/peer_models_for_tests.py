"""Small models with the structure of DALLE-pytorch, ruDALL-E and minGPT, written for the tests: same class, attribute
and argument names, dense attention under a mask whose rule is spelled out pair by pair.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


def mask_of(rule, text, side, n):
    """bool [n, n]: causal; image queries see all text, and the image tokens that rule(dr, dc, row, column) allows for
    the distance in rows and columns.
    """
    allowed = torch.zeros(n, n, dtype=torch.bool)
    for q in range(n):
        for k in range(q + 1):
            (qr, qc), (kr, kc) = divmod(q - text, side), divmod(k - text, side)
            allowed[q, k] = q < text or k < text or rule(qr - kr, qc - kc)
    return allowed


def masked_attention(q, k, v, allowed):
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~allowed, -math.inf)
    return scores.softmax(-1) @ v


def split_heads(x, heads):
    batch, n, width = x.shape
    return x.reshape(batch, n, heads, width // heads).permute(0, 2, 1, 3)


def merge_heads(x):
    return x.permute(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


def turn(x, angles):
    """Pairs of neighbouring channels as complex numbers, times exp(i angle)."""
    turned, rest = x[..., : angles.shape[-1]], x[..., angles.shape[-1] :]
    numbers = torch.view_as_complex(turned.reshape(*turned.shape[:-1], -1, 2).contiguous())
    numbers = numbers * torch.polar(torch.ones_like(angles), angles)[..., ::2]
    return torch.cat([torch.view_as_real(numbers).flatten(-2), rest], -1)


# -- DALLE-pytorch


class DPBase(nn.Module):
    def __init__(self, dim, seq_len, heads, dim_head, dropout=0.0, **attributes):
        super().__init__()
        self.heads, self.seq_len, self.scale, self.stable = heads, seq_len, dim_head**-0.5, False
        for name, value in attributes.items():
            setattr(self, name, value)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * dim_head, dim), nn.Dropout(dropout))

    def attend(self, x, allowed, rotary_pos_emb):
        q, k, v = (split_heads(part, self.heads) for part in self.to_qkv(x).chunk(3, -1))
        if rotary_pos_emb is not None:
            q, k, v = (turn(part, rotary_pos_emb[:, : x.shape[1]]) for part in (q, k, v))
        return merge_heads(masked_attention(q, k, v, allowed))


class Attention(DPBase):
    def __init__(self, *arguments, causal=True, static_mask=None, **options):
        super().__init__(*arguments, causal=causal, **options)
        self.register_buffer("static_mask", static_mask, persistent=False)

    def forward(self, x, mask=None, rotary_pos_emb=None, cache=None, cache_key=None):
        n = x.shape[1]
        allowed = torch.ones(n, n, dtype=torch.bool)
        allowed = allowed.tril() if self.causal else allowed
        if self.static_mask is not None:
            allowed = allowed & self.static_mask[:n, :n]
        if mask is not None:
            allowed = allowed & mask[:, None, None]
        if cache is not None:
            cache["calls"] = cache.get("calls", 0) + 1
        return self.to_out(self.attend(x, allowed, rotary_pos_emb))


class DPImage(DPBase):
    def image_attention(self, rule, x, mask, rotary_pos_emb):
        n, side = x.shape[1], self.image_size
        text = self.seq_len + 1 - side**2
        x = F.pad(x, (0, 0, 0, self.seq_len + 1 - n))
        allowed = mask_of(rule, text, side, self.seq_len + 1)
        if mask is not None:
            allowed = allowed & F.pad(mask[:, :text], (0, side**2), value=True)[:, None, None]
        return self.to_out(self.attend(x, allowed, rotary_pos_emb))[:, :n]


class SparseAxialCausalAttention(DPImage):
    def forward(self, x, mask=None, rotary_pos_emb=None):
        def rule(rows, columns):
            return (rows, columns)[self.axis] == 0

        return self.image_attention(rule, x, mask, rotary_pos_emb)


class SparseConvCausalAttention(DPImage):
    def forward(self, x, mask=None, rotary_pos_emb=None):
        reach = range(0, self.kernel_size * self.dilation, self.dilation)

        def rule(rows, columns):
            return rows in reach and columns in reach

        return self.image_attention(rule, x, mask, rotary_pos_emb)


class DALLE(nn.Module):
    """Text of `text` tokens and an image of side x side; the start token makes the text of attention one longer."""

    def __init__(self, types=("full", "row", "column", "conv"), text=6, side=4, dim=24, rotary=True, dropout=0.0):
        super().__init__()
        self.text, self.vocabulary = text, 40
        seq_len, common = text + side**2, (dim, text + side**2, 2, 12, dropout)
        static = mask_of(lambda rows, columns: columns == 0, text + 1, side, seq_len)
        static[:, : text + 1] = True  # dalle-pytorch's static masks rely on the causal mask
        makers = {
            "full": lambda: Attention(*common),
            "static": lambda: Attention(*common, static_mask=static),
            "row": lambda: SparseAxialCausalAttention(*common, axis=0, image_size=side),
            "column": lambda: SparseAxialCausalAttention(*common, axis=1, image_size=side),
            "conv": lambda: SparseConvCausalAttention(*common, image_size=side, kernel_size=3, dilation=1),
            "dilated": lambda: SparseConvCausalAttention(*common, image_size=side, kernel_size=3, dilation=2),
            "bidirectional": lambda: Attention(*common, causal=False),
        }
        self.attentions = nn.ModuleList(makers[name]() for name in types)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in types)
        self.emb = nn.Embedding(self.vocabulary, dim)
        self.to_logits = nn.Linear(dim, self.vocabulary)
        self.register_buffer("pos_emb", torch.rand(1, seq_len + 1, 4).repeat_interleave(2, -1) if rotary else None)

    def forward(self, tokens, **options):
        """tokens [B, text + image] -> logits of each from those before it."""
        x = self.emb(F.pad(tokens, (1, -1)))
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            x = x + attention(norm(x), rotary_pos_emb=self.pos_emb, **options)
        return self.to_logits(x)


# -- ruDALL-E


class DalleSelfAttention(nn.Module):
    def __init__(self, width, heads, attention_dropout, output_dropout, relaxed):
        super().__init__()
        self.num_attention_heads, self.relaxed = heads, relaxed
        self.query_key_value, self.dense = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attention_dropout, self.output_dropout = nn.Dropout(attention_dropout), nn.Dropout(output_dropout)

    def forward(self, hidden_states, ltor_mask, use_cache=False, cache=None):
        q, k, v = (split_heads(x, self.num_attention_heads) for x in self.query_key_value(hidden_states).chunk(3, -1))
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        scores = scores * ltor_mask - 10000.0 * (1 - ltor_mask)
        if self.relaxed:  # PB-relax
            scores = (scores / 32 - (scores / 32).detach().amax((2, 3), keepdim=True)) * 32
        out = self.dense(merge_heads(self.attention_dropout(scores.softmax(-1)) @ v))
        out = out.clamp(-65504, 65504)
        return self.output_dropout(out), (k, v, out) if use_cache else cache


class DalleTransformerLayer(nn.Module):
    def __init__(self, width, heads, attention_dropout, output_dropout, relaxed):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = DalleSelfAttention(width, heads, attention_dropout, output_dropout, relaxed)


class DalleTransformer(nn.Module):
    """Masks of version 3 (the window is clipped) or 2 (it wraps around)."""

    def __init__(self, layers, version, text=5, side=4, width=24, dropouts=(0.0, 0.0), relaxed=True, kernel=11):
        super().__init__()
        near, n = kernel // 2, text + side**2

        def row(rows, columns):
            return rows * side + columns <= side

        def wrapped(rows, columns):
            return min(rows % side, -rows % side) <= near and min(columns % side, -columns % side) <= near

        def clipped(rows, columns):
            return rows <= near and abs(columns) <= near

        rules = {"row": row, "col": lambda _, columns: columns == 0, "conv": clipped if version == "v3" else wrapped}
        for name, rule in rules.items():
            self.register_buffer(f"{name}_mask", mask_of(rule, text, side, n).float())
        self.layers = nn.ModuleList(DalleTransformerLayer(width, 2, *dropouts, relaxed) for _ in range(layers))

    def _get_layer_mask(self, i):
        if i % 4 == 1:
            return self.col_mask
        return self.conv_mask if i == len(self.layers) - 1 else self.row_mask

    def forward(self, hidden_states, attention_mask, use_cache=False):
        n = hidden_states.shape[1]
        for i, layer in enumerate(self.layers):
            mask = attention_mask * self._get_layer_mask(i)[:n, :n]
            out, _ = layer.attention(layer.norm(hidden_states), mask, use_cache=use_cache)
            hidden_states = hidden_states + out
        return hidden_states


class RuDALLE(nn.Module):
    def __init__(self, layers=3, version="v3", **options):
        super().__init__()
        self.transformer = DalleTransformer(layers, version, **options)
        self.emb, self.to_logits = nn.Embedding(40, 24), nn.Linear(24, 40)

    def forward(self, tokens, attention_mask=None, use_cache=False):
        x = self.emb(tokens)
        if attention_mask is None:
            attention_mask = x.new_ones(len(x), 1, x.shape[1], x.shape[1]).tril()
        return self.to_logits(self.transformer(x, attention_mask, use_cache))


# -- minGPT


class GPTBase(nn.Module):
    def __init__(self, block_size, width, attn_pdrop, resid_pdrop, unmasked, pair, scale):
        super().__init__()
        self.n_head, self.pair, self.scale = 3, pair, scale
        mask = torch.ones(block_size, block_size).tril()
        mask[:unmasked, :unmasked] = 1
        self.make(width, nn.Dropout(attn_pdrop), nn.Dropout(resid_pdrop), mask[None, None])

    def attend(self, q, k, v, mask, drop):
        q, k, v = (split_heads(x, self.n_head) for x in (q, k, v))
        scores = self.scale * q @ k.mT / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(mask[..., : q.shape[2], : q.shape[2]] == 0, -math.inf)
        return merge_heads(drop(scores.softmax(-1)) @ v)


def separate():
    """The layout of 2020, with a projection each for queries, keys and values."""

    class CausalSelfAttention(GPTBase):
        def make(self, width, attn_drop, resid_drop, mask):
            self.key, self.query, self.value, self.proj = (nn.Linear(width, width) for _ in range(4))
            self.attn_drop, self.resid_drop = attn_drop, resid_drop
            self.register_buffer("mask", mask)

        def forward(self, x, layer_past=None):
            out = self.attend(self.query(x), self.key(x), self.value(x), self.mask, self.attn_drop)
            out = self.resid_drop(self.proj(out))
            return (out, layer_past) if self.pair else out

    return CausalSelfAttention


def fused():
    """The layout of today, with one projection for all."""

    class CausalSelfAttention(GPTBase):
        def make(self, width, attn_drop, resid_drop, mask):
            self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.attn_dropout, self.resid_dropout = attn_drop, resid_drop
            self.register_buffer("bias", mask)

        def forward(self, x):
            out = self.attend(*self.c_attn(x).chunk(3, -1), self.bias, self.attn_dropout)
            return self.resid_dropout(self.c_proj(out))

    return CausalSelfAttention


class GPT(nn.Module):
    def __init__(self, make=separate, attn_pdrop=0.0, resid_pdrop=0.0, unmasked=0, pair=False, scale=1.0):
        super().__init__()
        self.blocks = nn.ModuleList(make()(22, 24, attn_pdrop, resid_pdrop, unmasked, pair, scale) for _ in range(2))
        self.emb, self.to_logits = nn.Embedding(40, 24), nn.Linear(24, 40)

    def forward(self, tokens):
        x = self.emb(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.to_logits(x)


# -- torch.nn


class Encoder(nn.Module):
    """A language model of nn.TransformerEncoder. `mask`: "causal" with the hint, "read" without it, or a tensor."""

    def __init__(self, mask="causal", batch_first=True, norm_first=False, dropout=0.0, attention_dropout=None):
        super().__init__()
        layer = nn.TransformerEncoderLayer(24, 2, 48, dropout, batch_first=batch_first, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        for layer in self.encoder.layers:
            layer.self_attn.dropout = dropout if attention_dropout is None else attention_dropout
        self.emb, self.to_logits = nn.Embedding(40, 24), nn.Linear(24, 40)
        self.hint, self.batch_first = mask == "causal" if isinstance(mask, str) else None, batch_first
        self.register_buffer("mask", None if isinstance(mask, str) else mask, persistent=False)

    def forward(self, tokens, **options):
        x, n = self.emb(tokens), tokens.shape[1]
        causal = nn.Transformer.generate_square_subsequent_mask(n, dtype=x.dtype)
        mask = self.mask if self.hint is None else causal
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.encoder(x, mask=mask, is_causal=self.hint or None, **options)
        return self.to_logits(x if self.batch_first else x.transpose(0, 1))


# -- a dVAE


class DiscreteVAE(nn.Module):
    def __init__(self, straight_through=False):
        super().__init__()
        self.encoder, self.codebook = nn.Conv2d(3, 32, 4, 4), nn.Embedding(32, 8)
        self.decoder, self.straight_through = nn.ConvTranspose2d(8, 3, 4, 4), straight_through

    def forward(self, images, temp=0.9):
        one_hot = F.gumbel_softmax(self.encoder(images), tau=temp, dim=1, hard=self.straight_through)
        return self.decoder(torch.einsum("bnhw,nd->bdhw", one_hot, self.codebook.weight))
