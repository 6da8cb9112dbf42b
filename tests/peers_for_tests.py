"""Models of other projects, rebuilt small in plain PyTorch, with the names of their weights."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from dalle.models import variant, vqgan
from dalle.models.variant import VariantPriorConfig

# ruDALL-E: a transformer over text and image

REACH = 2  # of the convolution; in the published models 5


def rudalle_mask(kind, text_len, grid, version):
    """bool [N, N], by the definition of every pair."""
    n = text_len + grid * grid
    mask = torch.zeros(n, n, dtype=torch.bool)
    for q, k in itertools.product(range(n), repeat=2):
        both = min(q, k) >= text_len
        mask[q, k] = k <= q and (not both or _image_pair(kind, q - text_len, k - text_len, grid, version))
    return mask


def _image_pair(kind, q, k, grid, version):
    if kind == "row":
        return q - k <= grid
    if kind == "col":
        return (q - k) % grid == 0
    rows, columns = q // grid - k // grid, q % grid - k % grid
    if version == 3:
        return rows <= REACH and abs(columns) <= REACH
    return min(rows % grid, -rows % grid) <= REACH and min(columns % grid, -columns % grid) <= REACH


class RudalleLayer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        for name in ("input", "before_first_addition", "before_second_addition", "post_attention"):
            setattr(self, f"{name}_layernorm", nn.LayerNorm(width))
        self.attention = nn.ModuleDict(
            {"query_key_value": nn.Linear(width, 3 * width), "dense": nn.Linear(width, width)}
        )
        self.mlp = nn.ModuleDict(
            {"dense_h_to_4h": nn.Linear(width, 4 * width), "dense_4h_to_h": nn.Linear(4 * width, width)}
        )

    def forward(self, x, mask):
        q, k, v = self.attention["query_key_value"](self.input_layernorm(x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        scores = scores * mask - 10000.0 * ~mask
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + self.before_first_addition_layernorm(self.attention["dense"](y))
        h = self.mlp["dense_h_to_4h"](self.post_attention_layernorm(x))
        h = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
        return x + self.before_second_addition_layernorm(self.mlp["dense_4h_to_h"](h))


class Rudalle(nn.Module):
    """Text with ids 0 of padding, int64 [B, T], and all codes, [B, G * G], to logits over text and image tokens."""

    def __init__(self, version, text_len=10, vocab=40, grid=6, image_vocab=30, layers=4, width=32, heads=2):
        super().__init__()
        self.version, self.text_len, self.grid, self.vocab = version, text_len, grid, vocab + text_len
        self.text_embeddings = nn.Embedding(self.vocab, width)
        self.image_embeddings = nn.Embedding(image_vocab, width)
        self.text_pos_embeddings = nn.Embedding(text_len + 1, width)
        self.image_row_embeddings, self.image_col_embeddings = nn.Embedding(grid, width), nn.Embedding(grid, width)
        self.to_logits = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, self.vocab + image_vocab))
        self.transformer = nn.Module()
        self.transformer.layers = nn.ModuleList(RudalleLayer(width, heads) for _ in range(layers))
        self.transformer.final_layernorm = nn.LayerNorm(width)
        for kind in ("row", "col", "conv"):
            self.transformer.register_buffer(f"{kind}_mask", rudalle_mask(kind, text_len, grid, version)[None, None])
        for name, parameter in self.named_parameters():
            spread(name, parameter)

    def forward(self, text, codes):
        padding = torch.arange(self.text_len) + self.vocab - self.text_len
        text = torch.where(text == 0, padding, text)
        if self.version == 2:
            text = F.pad(text, (1, 0), value=2)
        positions = torch.arange(codes.shape[1])
        image = self.image_embeddings(codes) + self.image_row_embeddings(positions // self.grid)
        image = image + self.image_col_embeddings(positions % self.grid)
        x = torch.cat([self.text_embeddings(text) + self.text_pos_embeddings.weight[: text.shape[1]], image], 1)
        x = x[:, : self.text_len + self.grid**2]
        kinds = ["col" if i % 4 == 1 else "row" for i in range(len(self.transformer.layers) - 1)] + ["conv"]
        for layer, kind in zip(self.transformer.layers, kinds, strict=True):
            mask = self.transformer.get_buffer(f"{kind}_mask")[0, 0]
            x = layer(x, mask[: x.shape[1], : x.shape[1]])
        return self.to_logits(self.transformer.final_layernorm(x))


RUDALLE = VariantPriorConfig(10, 40, (6, 6), 30, layers=4, heads=2, head_dim=16, conv_kernel=5)  # of version 3
MERGES = [("а", "б"), ("▁", "аб"), ("в", "г"), (".", "."), ("..", "."), ("▁аб", "вг")]


def small_rudalle(monkeypatch):
    """Presets of the size of `Rudalle`, in place of the published ones."""
    monkeypatch.setitem(variant.PRESETS, "malevich", RUDALLE)
    monkeypatch.setitem(vqgan.PRESETS, "rudalle", vqgan.VQGANConfig(12, 30, (32, 64), codebook_dim=16))


def yttm_lines(alphabet, merges=MERGES):
    """A model as YouTokenToMe writes it: special ids 0 to 3, then characters and merges; and its ids."""
    ids = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in merges)], 4)}
    lines = [f"{len(alphabet)} {len(merges)}", *(f"{ord(c)} {ids[c]}" for c in reversed(alphabet))]
    return [*lines, *(f"{ids[a]} {ids[b]} {ids[a + b]}" for a, b in merges), "1 0 2 3"], ids


def write_rudalle(directory, prior):
    """The files of a model, with a tokenizer of 40 tokens."""
    directory.mkdir()
    alphabet = "▁." + "".join(map(chr, range(0x430, 0x430 + 28)))
    (directory / "bpe.model").write_text("\n".join(yttm_lines(alphabet)[0]), encoding="utf-8")
    torch.save(prior.state_dict(), directory / f"pytorch_model_v{prior.version}.bin")
    state = Taming(True, 30, (32, 64), 16).state_dict()
    torch.save({"state_dict": state}, directory / "vqgan.gumbelf8-sber.model.ckpt")


# minDALL-E


class MindalleBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict({name: nn.Linear(width, width) for name in ("key", "query", "value", "proj")})
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.0))

    def forward(self, x):
        h = self.ln1(x)
        q, k, v = (self.attn[name](h).unflatten(-1, (self.heads, -1)) for name in ("query", "key", "value"))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
        x = x + self.attn["proj"]((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln2(x))


class Mindalle(nn.Module):
    """Padded text, int64 [B, T], and the first codes, [B, n], to logits over text and over image tokens."""

    def __init__(self, text_len=7, vocab=40, tokens=16, image_vocab=30, layers=2, width=32, heads=2):
        super().__init__()
        self.tok_emb_img, self.tok_emb_txt = nn.Embedding(image_vocab, width), nn.Embedding(vocab, width)
        self.pos_emb_img, self.pos_emb_txt = nn.Embedding(tokens, width), nn.Embedding(text_len, width)
        self.blocks = nn.Sequential(*(MindalleBlock(width, heads) for _ in range(layers)))
        self.ln_f = nn.LayerNorm(width)
        self.head_img = nn.Linear(width, image_vocab, bias=False)
        self.head_txt = nn.Linear(width, vocab, bias=False)
        for name, parameter in self.named_parameters():
            spread(name, parameter)

    def forward(self, text, codes):
        x = torch.cat(
            [
                self.tok_emb_txt(text) + self.pos_emb_txt.weight,
                self.tok_emb_img(codes) + self.pos_emb_img.weight[: codes.shape[1]],
            ],
            1,
        )
        x = self.ln_f(self.blocks(x))
        return self.head_txt(x), self.head_img(x)


# taming-transformers' VQGAN


class Resnet(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, n_in, 1e-6), nn.GroupNorm(32, n_out, 1e-6)
        self.conv1, self.conv2 = nn.Conv2d(n_in, n_out, 3, padding=1), nn.Conv2d(n_out, n_out, 3, padding=1)
        if n_in != n_out:
            self.nin_shortcut = nn.Conv2d(n_in, n_out, 1)

    def forward(self, x):
        h = self.norm1(x)
        h = self.norm2(self.conv1(h * h.sigmoid()))
        shortcut = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return shortcut + self.conv2(h * h.sigmoid())


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.GroupNorm(32, width, 1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2) for f in (self.q, self.k, self.v))
        weights = (torch.einsum("bci,bcj->bij", q, k) / x.shape[1] ** 0.5).softmax(-1)
        return x + self.proj_out(torch.einsum("bij,bcj->bci", weights, v).view_as(x))


def _module(**children):
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


def _level(n_in, n_out, blocks, attention, **scale):
    attn = [Attention(n_out) for _ in range(blocks)] if attention else []
    resnets = [Resnet(n_in if i == 0 else n_out, n_out) for i in range(blocks)]
    return _module(block=nn.ModuleList(resnets), attn=nn.ModuleList(attn), **scale)


def _run(level, x):
    for i, block in enumerate(level.block):
        x = block(x)
        if len(level.attn):
            x = level.attn[i](x)
    return x


def _mid(width):
    return _module(block_1=Resnet(width, width), attn_1=Attention(width), block_2=Resnet(width, width))


class Taming(nn.Module):
    """A VQGAN with `widths` channels; a `gumbel` one, or one with a codebook of nearest vectors."""

    def __init__(self, gumbel, vocab, widths, dim, blocks=2):
        super().__init__()
        self.gumbel, self.levels = gumbel, len(widths)
        low = self.levels - 1
        down = [
            _level(widths[max(i - 1, 0)], w, blocks, i == low, **(
                {} if i == low else {"downsample": _module(conv=nn.Conv2d(w, w, 3, stride=2))}))
            for i, w in enumerate(widths)
        ]  # fmt: skip
        up = [
            _level(widths[min(i + 1, low)], w, blocks + 1, i == low, **(
                {} if i == 0 else {"upsample": _module(conv=nn.Conv2d(w, w, 3, padding=1))}))
            for i, w in enumerate(widths)
        ]  # fmt: skip
        norm = [nn.GroupNorm(32, w, 1e-6) for w in (widths[-1], widths[0])]
        self.encoder = _module(
            conv_in=nn.Conv2d(3, widths[0], 3, padding=1), down=nn.ModuleList(down), mid=_mid(widths[-1]),
            norm_out=norm[0], conv_out=nn.Conv2d(widths[-1], dim, 3, padding=1),
        )  # fmt: skip
        self.decoder = _module(
            conv_in=nn.Conv2d(dim, widths[-1], 3, padding=1), mid=_mid(widths[-1]), up=nn.ModuleList(up),
            norm_out=norm[1], conv_out=nn.Conv2d(widths[0], 3, 3, padding=1),
        )  # fmt: skip
        self.quant_conv, self.post_quant_conv = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)
        if gumbel:
            self.quantize = _module(proj=nn.Conv2d(dim, vocab, 1), embed=nn.Embedding(vocab, dim))
        else:
            self.quantize = _module(embedding=nn.Embedding(vocab, dim))
        for name, parameter in self.named_parameters():
            spread(name, parameter)

    def encode(self, x):
        """Images in [-1, 1] to what the codebook is compared with, and the codes."""
        part = self.encoder
        h = part.conv_in(x)
        for i, level in enumerate(part.down):
            h = _run(level, h)
            if i < self.levels - 1:
                h = level.downsample.conv(F.pad(h, (0, 1, 0, 1)))
        h = part.norm_out(part.mid.block_2(part.mid.attn_1(part.mid.block_1(h))))
        h = self.quant_conv(part.conv_out(h * h.sigmoid()))
        if self.gumbel:
            logits = self.quantize.proj(h)
            return logits, logits.argmax(1)
        distances = (h[:, None] - self.quantize.embedding.weight[None, :, :, None, None]).square().sum(2)
        return distances, distances.argmin(1)

    def decode(self, codes):
        part, codebook = self.decoder, self.quantize.embed if self.gumbel else self.quantize.embedding
        h = part.conv_in(self.post_quant_conv(codebook(codes).movedim(-1, 1)))
        h = part.mid.block_2(part.mid.attn_1(part.mid.block_1(h)))
        for i in reversed(range(self.levels)):
            h = _run(part.up[i], h)
            if i:
                h = part.up[i].upsample.conv(h.repeat_interleave(2, 2).repeat_interleave(2, 3))
        h = part.norm_out(h)
        return part.conv_out(h * h.sigmoid())


def spread(name, parameter):
    """Random values for norms and biases too, so that none of them can be mistaken for another, and convolutions that
    do not level out all differences.
    """
    with torch.no_grad():
        if parameter.ndim == 4:
            parameter *= 2
        if parameter.ndim == 1:  # only the weights of norms and biases are vectors
            parameter.normal_(1.0 if name.endswith("weight") else 0.0, 0.2)
