"""The attention modules that `patch` knows: how each is recognised, and its forward on `sparse_attention`."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from .gumbel_softmax import gumbel_softmax
from .patterns import AttentionPattern
from .sparse_attention import sparse_attention


class Keep(Exception):
    """The reason why a module, or one call of it, keeps its own forward."""


@dataclass(eq=False)
class Site:
    """The forward of `module` after a patch: `forward(site, ...)`, or the module's own one where that raises Keep.

    It is an attribute of the module and refers to it, so that a copy of the model has sites of its own.

    Attributes:
        name: the module's name in the model.
        pattern: that of the attention; None if the mask of each call decides.
        dropout: the module of the attention dropout and the name of its probability; None if there is none.
        kept: reasons of calls that kept the module's own forward, by `name`; shared with the Patch.
    """

    name: str
    module: nn.Module
    forward: Callable[..., Any]
    pattern: AttentionPattern | None = None
    dropout: tuple[nn.Module, str] | None = None
    kept: dict[str, str] = field(default_factory=dict)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.forward(self, *args, **kwargs)
        except Keep as reason:
            self.kept[self.name] = str(reason)
        return self.own(*args, **kwargs)

    def own(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)

    def dropout_p(self) -> float:
        """The probability with which the module, in its present mode, drops attention weights."""
        if self.dropout is None:
            return 0.0
        module, name = self.dropout
        return getattr(module, name) if module.training else 0.0

    def attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        pattern: AttentionPattern | None = None,
        scale: float | None = None,
    ) -> torch.Tensor:
        """q, k, v [B, heads, N, D] -> [B, N, heads * D]; `pattern`: None for the site's own."""
        if p := self.dropout_p():
            raise ValueError(refused_dropout({self.name: p}))
        # pyrefly: ignore[no-matching-overload]  # one of the two is given
        return sparse_attention(q, k, v, pattern or self.pattern, scale=scale).transpose(1, 2).flatten(2)

    def refuse_padding(self, padded: bool | torch.Tensor) -> None:
        if padded:
            raise ValueError(
                f"{self.name}: the mask of this call excludes keys that the pattern allows, such as padding, which "
                "sparse_attention cannot; call it without that mask, or undo() the patch"
            )


def refused_dropout(probabilities: dict[str, float]) -> str:
    """The error about modules, by name, that drop attention weights."""
    (name, p), more = next(iter(probabilities.items())), len(probabilities) - 1
    others = f" (and of {more} more modules)" if more else ""
    return (
        f"the attention dropout of {name}{others} is {p:g}, and sparse_attention has none; set it to 0, or call "
        "model.eval() before patching if you do not train"
    )


def find(module: nn.Module) -> list[Site]:
    """The sites of a module that contains or is a known attention, with names relative to it; [] for others.

    Raises:
        Keep: it looks like one, but its attention cannot be replaced.
    """
    owner = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    if owner.__name__ not in _KNOWN:
        return []
    sites = list(_KNOWN[owner.__name__](module))
    for site in sites:
        if "forward" in vars(site.module):
            raise Keep("its forward has been replaced already")
        own = list(inspect.signature(type(site.module).forward).parameters)[1:]
        if own != list(inspect.signature(site.forward).parameters)[1 : len(own) + 1]:
            raise Keep(f"its forward takes other arguments: {', '.join(own)}")
    return sites


def find_gumbel_softmax(module: nn.Module) -> list[Site]:
    """The site of a module whose forward calls F.gumbel_softmax, else []."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    found = code is not None and "gumbel_softmax" in code.co_names and "forward" not in vars(module)
    return [Site("", module, with_gumbel_softmax)] if found else []


class _GumbelSoftmax(TorchFunctionMode):
    """F.gumbel_softmax is ours while the mode is active."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (gumbel_softmax if func is F.gumbel_softmax else func)(*args, **(kwargs or {}))


def with_gumbel_softmax(site: Site, *args: Any, **kwargs: Any) -> Any:
    """The site's own forward with our gumbel_softmax in place of F.gumbel_softmax."""
    with _GumbelSoftmax():
        return site.own(*args, **kwargs)


# -- helpers


def _need(module: nn.Module, names: str) -> None:
    for name in names.split():
        if not hasattr(module, name):
            raise Keep(f"it is another {type(module).__name__} than the one patch knows: it has no {name!r}")


def _pattern_of(mask: torch.Tensor, named: Iterable[AttentionPattern] = ()) -> AttentionPattern:
    """The pattern of a bool mask [N, N]: the first of `named` that equals it, for its layout, else one from the mask.

    Raises:
        Keep: no pattern has this mask.
    """
    if mask.is_meta:
        raise Keep("its mask is on the meta device; patch once the model has its weights")
    mask = mask.cpu()
    for pattern in named:
        if pattern.seq_len >= len(mask) and torch.equal(pattern.dense(0, len(mask))[:, : len(mask)], mask):
            return pattern
    try:
        return AttentionPattern.from_mask(mask)
    except ValueError as error:
        raise Keep(str(error).partition(";")[0]) from None


def _heads(x: torch.Tensor, count: int) -> torch.Tensor:
    """[B, N, heads * D] -> [B, heads, N, D]."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


# -- DALLE-pytorch: its sequence is <bos>, text and image without the last token, so T = text_seq_len + 1


def _dalle_pytorch_dense(module: Any) -> Iterator[Site]:
    _need(module, "to_qkv to_out heads seq_len scale causal")
    if not module.causal:
        raise Keep("it is bidirectional")
    mask, n = getattr(module, "static_mask", None), module.seq_len
    if mask is None:
        yield Site("", module, _dalle_pytorch, AttentionPattern.causal(0, (1, n)))
        return
    text, side = int(mask[0].sum()), math.isqrt(max(0, n + 1 - int(mask[0].sum())))
    named = [make(text, (side, side)) for make in (AttentionPattern.axial_row, AttentionPattern.column) if side]
    yield Site("", module, _dalle_pytorch, _pattern_of(mask.tril(), named))


def _dalle_pytorch_sparse(module: Any) -> Iterator[Site]:
    _need(module, "to_qkv to_out heads seq_len scale image_size")
    side = module.image_size
    text = module.seq_len + 1 - side**2
    if hasattr(module, "axis"):
        make = (AttentionPattern.axial_row, AttentionPattern.column)[module.axis]
        yield Site("", module, _dalle_pytorch_padded, make(text, (side, side)))
        return
    _need(module, "kernel_size dilation")
    pattern = AttentionPattern.corner_conv(text, (side, side), module.kernel_size, module.dilation)
    yield Site("", module, _dalle_pytorch_padded, pattern)


def _dalle_pytorch_random(module: Any) -> Iterator[Site]:
    raise Keep("it has a random block-sparse mask of its own in every head")


def _dalle_pytorch(site, x, mask=None, rotary_pos_emb=None, cache=None, cache_key=None):
    if cache is not None:
        raise Keep("some calls have a cache")
    return site.module.to_out(_dalle_pytorch_attention(site, x, mask, rotary_pos_emb))


def _dalle_pytorch_padded(site, x, mask=None, rotary_pos_emb=None):
    """Like the module's own forward this pads to T + H * W tokens, for the same random numbers in to_out's dropout."""
    n = x.shape[1]
    out = _dalle_pytorch_attention(site, x, mask, rotary_pos_emb)
    return site.module.to_out(F.pad(out, (0, 0, 0, site.pattern.seq_len - n)))[:, :n]


def _dalle_pytorch_attention(site, x, mask, rotary_pos_emb):
    site.refuse_padding(mask is not None and not mask.all())
    module = site.module
    q, k, v = (_heads(part, module.heads) for part in module.to_qkv(x).chunk(3, -1))
    if rotary_pos_emb is not None:
        freqs = rotary_pos_emb[..., : x.shape[1], :]
        q, k, v = (_rotate(part, freqs) for part in (q, k, v))
    return site.attention(q, k, v, scale=module.scale)


def _rotate(x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of the first dims of x, in interleaved pairs."""
    rotated, rest = x.split((freqs.shape[-1], x.shape[-1] - freqs.shape[-1]), -1)
    turned = torch.stack((-rotated[..., 1::2], rotated[..., ::2]), -1).flatten(-2)
    return torch.cat((rotated * freqs.cos() + turned * freqs.sin(), rest), -1).to(x.dtype)


# -- ruDALL-E: every layer is called with the product of the caller's mask and one of the transformer's


def _rudalle_transformer(module: Any) -> Iterator[Site]:
    _need(module, "layers row_mask _get_layer_mask")
    for i, layer in enumerate(module.layers):
        attention = layer.attention
        _need(attention, "query_key_value attention_dropout dense output_dropout num_attention_heads")
        pattern = _pattern_of(module._get_layer_mask(i) != 0, _rudalle_patterns(module.row_mask))
        yield Site(f"layers.{i}.attention", attention, _rudalle, pattern, (attention.attention_dropout, "p"))


def _rudalle_patterns(row_mask: torch.Tensor) -> Iterator[AttentionPattern]:
    """The patterns of ruDALL-E for the text and grid of its row mask, whose last row is the text and W + 1 tokens."""
    without = len(row_mask) - int(row_mask[-1].sum())  # W * W - W - 1
    side = math.isqrt(without + 1) + 1
    text, grid = len(row_mask) - side**2, (side, side)
    if text >= 0:
        yield AttentionPattern.row(text, grid)
        yield AttentionPattern.column(text, grid)
        yield AttentionPattern.conv(text, grid, edge="clip")
        yield AttentionPattern.conv(text, grid, edge="torus")


def _rudalle_alone(module: Any) -> Iterator[Site]:
    raise Keep("its mask is part of the DalleTransformer around it; patch that")


def _rudalle(site, hidden_states, ltor_mask, use_cache=False, cache=None):
    if use_cache:
        raise Keep("some calls have a cache")
    module, n = site.module, hidden_states.shape[1]
    allowed = _dense(site.pattern, ltor_mask.device)[:n, :n].to(ltor_mask.dtype)
    site.refuse_padding(not torch.equal(ltor_mask, allowed.expand(ltor_mask.shape)))
    q, k, v = (_heads(part, module.num_attention_heads) for part in module.query_key_value(hidden_states).chunk(3, -1))
    out = module.dense(site.attention(q, k, v)).clamp(-65504, 65504)  # the range of float16
    return module.output_dropout(out), cache


@functools.lru_cache(maxsize=8)
def _dense(pattern: AttentionPattern, device: torch.device) -> torch.Tensor:
    return pattern.dense().to(device)


# -- minGPT, as of 2020 (taming-transformers) and of today


def _mingpt_attention(module: Any) -> Iterator[Site]:
    if hasattr(module, "query"):
        _need(module, "n_head key query value proj attn_drop resid_drop mask")
        forward, mask, dropout = _mingpt, module.mask, module.attn_drop
    else:
        _need(module, "n_head c_attn c_proj attn_dropout resid_dropout bias")
        forward, mask, dropout = _mingpt_fused, module.bias, module.attn_dropout
    mask = mask.squeeze() != 0
    pattern = _pattern_of(mask, [AttentionPattern.causal(0, (1, len(mask)))])
    site = Site("", module, forward, pattern, (dropout, "p"))
    if not _agrees(site):
        raise Keep("its forward computes something else, or returns more than a tensor")
    yield site


def _agrees(site: Site) -> bool:
    """Whether four tokens get the same output from both forwards: models that began as minGPT differ in details."""
    if site.dropout_p():
        return True  # patch refuses it
    weight = next(site.module.parameters())
    x = torch.sin(torch.arange(4 * weight.shape[1], device=weight.device)).to(weight.dtype).view(1, 4, -1)
    outputs = []
    for forward in (site.own, site):
        with torch.no_grad(), torch.random.fork_rng([weight.device] if weight.is_cuda else []):
            outputs.append(forward(x))
    theirs, ours = outputs
    return isinstance(theirs, torch.Tensor) and (theirs - ours).abs().max() <= 0.02 * theirs.abs().max()


def _mingpt(site, x, layer_past=None):
    module = site.module
    q, k, v = (_heads(project(x), module.n_head) for project in (module.query, module.key, module.value))
    return module.resid_drop(module.proj(site.attention(q, k, v)))


def _mingpt_fused(site, x):
    module = site.module
    q, k, v = (_heads(part, module.n_head) for part in module.c_attn(x).chunk(3, -1))
    return module.resid_dropout(module.c_proj(site.attention(q, k, v)))


# -- torch.nn: the mask of each call decides


def _torch_attention(module: Any) -> Iterator[Site]:
    _check_torch(module)
    yield Site("", module, _torch, dropout=(module, "dropout"))


def _torch_encoder_layer(module: Any) -> Iterator[Site]:
    """The layer, not its self_attn: in eval mode it computes attention in a fused kernel of its own."""
    _must_be(module, nn.TransformerEncoderLayer, "forward", "_sa_block")
    _check_torch(module.self_attn)
    yield Site("", module, _torch_layer, dropout=(module.self_attn, "dropout"))


def _must_be(module: nn.Module, cls: type[nn.Module], *methods: str) -> None:
    if any(getattr(type(module), method, None) is not getattr(cls, method) for method in methods):
        raise Keep(f"it is another {cls.__name__} than that of torch.nn")
    if "forward" in vars(module):
        raise Keep("its forward has been replaced already")


def _check_torch(attention: Any) -> None:
    _must_be(attention, nn.MultiheadAttention, "forward")
    if attention.in_proj_weight is None:
        raise Keep("its keys and values have widths of their own (kdim, vdim)")
    if attention.bias_k is not None or attention.add_zero_attn:
        raise Keep("it adds a key (add_bias_kv or add_zero_attn)")


def _torch(
    site,
    query,
    key,
    value,
    key_padding_mask=None,
    need_weights=True,
    attn_mask=None,
    average_attn_weights=True,
    is_causal=False,
):
    if query is not key or query is not value:
        raise Keep("some calls are cross attention")
    if need_weights:
        raise Keep("some calls return the attention weights (need_weights=True)")
    pattern = _pattern_of_call(site, site.module, query, attn_mask, key_padding_mask, is_causal)
    return _torch_self_attention(site, site.module, query, pattern), None


def _torch_layer(site, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
    layer = site.module
    pattern = _pattern_of_call(site, layer.self_attn, src, src_mask, src_key_padding_mask, is_causal)

    def attend(x):
        return layer.dropout1(_torch_self_attention(site, layer.self_attn, x, pattern))

    if layer.norm_first:
        x = src + attend(layer.norm1(src))
        return x + layer._ff_block(layer.norm2(x))
    x = layer.norm1(src + attend(src))
    return layer.norm2(x + layer._ff_block(x))


def _torch_self_attention(site, attention, x, pattern):
    x = x if attention.batch_first else x.transpose(0, 1)
    parts = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
    q, k, v = (_heads(part, attention.num_heads) for part in parts)
    # As in the module's own forward memory is in the order [N, B, E]: dropout draws its numbers in that order.
    out = attention.out_proj(site.attention(q, k, v, pattern).transpose(0, 1))
    return out.transpose(0, 1) if attention.batch_first else out


def _pattern_of_call(site, attention, x, mask, key_padding_mask, is_causal):
    """The pattern of a call with `mask`, which excludes True, or adds 0 or -inf to the scores."""
    if mask is None:
        raise Keep("some calls are bidirectional: they have no mask")
    if x.ndim != 3 or x.is_nested:
        raise Keep("some inputs have no batch dimension or are nested")
    if is_causal:
        n = x.shape[1 if attention.batch_first else 0]
        pattern = AttentionPattern.causal(0, (1, n))
    else:
        pattern = _pattern_of_mask(mask)
    site.refuse_padding(key_padding_mask is not None and key_padding_mask.bool().any())
    return pattern


_patterns = WeakTensorKeyDictionary()  # of masks: (version, pattern), for the other layers of a model


def _pattern_of_mask(mask: torch.Tensor) -> AttentionPattern:
    version = None if mask.is_inference() else mask._version  # of an inference tensor changes cannot be seen
    known, pattern = _patterns.get(mask, (None, None))
    if known is None or known != version:
        if mask.ndim != 2 or mask.shape[0] != mask.shape[1]:
            raise Keep(f"some masks are not [N, N] but {list(mask.shape)}")
        allowed = ~mask if mask.dtype == torch.bool else mask == 0
        if mask.dtype != torch.bool and not torch.equal(allowed, mask != -math.inf):
            raise Keep("some masks add other numbers than 0 and -inf to the scores")
        pattern = _pattern_of(allowed, [AttentionPattern.causal(0, (1, len(mask)))])
        _patterns[mask] = version, pattern
    return pattern


_KNOWN: dict[str, Callable[[Any], Iterator[Site]]] = {
    "Attention": _dalle_pytorch_dense,
    "SparseAxialCausalAttention": _dalle_pytorch_sparse,
    "SparseConvCausalAttention": _dalle_pytorch_sparse,
    "SparseAttention": _dalle_pytorch_random,
    "DalleTransformer": _rudalle_transformer,
    "DalleSelfAttention": _rudalle_alone,
    "CausalSelfAttention": _mingpt_attention,
    "MultiheadAttention": _torch_attention,
    "TransformerEncoderLayer": _torch_encoder_layer,
}
