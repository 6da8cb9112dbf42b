"""Our operations in models of other packages."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Literal

from torch import nn

from . import patch_targets
from .patch_targets import Keep, Site


class Patch:
    """What `patch` did to a model. As a context manager it is undone at the end of the block.

    Attributes:
        replaced: name of each replaced module -> what it computes now.
        kept: name of each module that keeps its own forward, in all calls or in some -> the reason. Calls add to it.
    """

    def __init__(self, sites: list[Site], kept: dict[str, str]) -> None:
        self.kept = kept
        self.replaced = {site.name: _described(site) for site in sites}
        self._sites = sites
        for site in sites:
            site.kept = kept
            site.module.forward = site

    def undo(self) -> None:
        """Gives every module its own forward again; a second call does nothing.

        Raises:
            RuntimeError: somebody else has replaced a forward since; undo that first.
        """
        for site in self._sites:
            if vars(site.module).get("forward") is not site:
                raise RuntimeError(f"the forward of {site.name} has been replaced after the patch; undo that first")
        for site in self._sites:
            del site.module.forward
        self._sites = []

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()

    def __str__(self) -> str:
        """A line per module."""
        lines = [f"replaced {name}: {what}" for name, what in self.replaced.items()]
        return "\n".join([*lines, *(f"kept {name}: {why}" for name, why in self.kept.items())])


def patch(model: nn.Module, *, gumbel: bool = False, dropout: Literal["refuse"] = "refuse") -> Patch:
    """Replaces the attention of a model by `sparse_attention` with the pattern of its mask, in place.

    Known are DALLE-pytorch's transformer, ruDALL-E's, minGPT's (also taming-transformers'), and nn.MultiheadAttention
    and nn.TransformerEncoder. They are recognised by class names, attributes and masks; their packages are not
    imported. Where a module has its mask as a tensor, the pattern is compared with it; of minGPT, which has many
    variants, the output for a few tokens too. With torch.nn the mask of each call decides: causal ones are replaced;
    without `is_causal=True` the mask is read, which breaks a torch.compile graph.

    Parameters, state dict and random numbers stay as they were; outputs and gradients change by rounding only. A patch
    sets the attribute `forward` of the replaced modules, so copies and pickles of the model are patched too, and DDP,
    FSDP, functional_call and torch.compile work as before; nn.DataParallel, which copies modules in its own way, does
    not. What a call asks for beyond the kernels (a cache, attention weights, cross attention, bidirectional attention)
    is computed by the module's own forward, and noted in `Patch.kept`.

    Args:
        model: a constructed model.
        gumbel: also replace F.gumbel_softmax in modules whose forward calls it, such as a dVAE: the same distribution,
            but other noise for the same state of torch's generator.
        dropout: of attention weights: "refuse" raises an error if it is above 0 while the module is in training mode,
            here and in later calls.

    Returns:
        A Patch; `print` shows what was replaced and kept.

    Raises:
        ValueError: there is nothing to replace, attention dropout is active, or (in a later call) a mask excludes keys
            that the pattern allows, such as padding.
        TypeError: the model is not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
    if dropout != "refuse":
        raise ValueError(f"dropout={dropout!r} is not 'refuse'")
    kept = {}
    sites = list(_sites(model, gumbel, kept))
    dropping = {site.name: p for site in sites if (p := site.dropout_p())}
    if dropping:
        raise ValueError(patch_targets.refused_dropout(dropping))
    if not sites:
        raise ValueError(_nothing(model, kept))
    if gumbel and not any(site.forward is patch_targets.with_gumbel_softmax for site in sites):
        raise ValueError(f"gumbel=True, but no module of {type(model).__name__} calls F.gumbel_softmax in its forward")
    return Patch(sites, kept)


def _sites(model: nn.Module, gumbel: bool, kept: dict[str, str]) -> Iterator[Site]:
    """What to replace. Reasons against the rest go to `kept`."""
    done = set()
    for name, module in model.named_modules():
        if module in done:
            continue
        try:
            sites = patch_targets.find(module)
        except Keep as reason:
            sites, kept[name or type(model).__name__] = [], str(reason)
            if "forward" in vars(module):
                done.update(module.modules())
        if gumbel:
            sites += patch_targets.find_gumbel_softmax(module)
        for site in sites:
            site.name = ".".join(filter(None, (name, site.name))) or type(model).__name__
            done.update(site.module.modules())
            yield site


def _nothing(model: nn.Module, kept: dict[str, str]) -> str:
    if not kept:
        why = "no attention that patch knows; call dk.sparse_attention in the forward of yours"
    else:
        name, why = next(iter(kept.items()))
        why = f"{name} is kept because {why}" + (f" ({len(kept) - 1} more are kept too)" if len(kept) > 1 else "")
    return f"there is nothing to replace in {type(model).__name__}: {why}"


def _described(site: Site) -> str:
    if site.forward is patch_targets.with_gumbel_softmax:
        return "gumbel_softmax"
    if site.pattern is None:
        return "sparse_attention, for the causal mask of a call"
    height, width = site.pattern.grid
    options = "".join(f", {name}={value}" for name, value in site.pattern.options)
    return f"sparse_attention, {site.pattern.name}, {site.pattern.text_len} + {height} x {width} tokens{options}"
