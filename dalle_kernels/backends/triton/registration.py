"""Registers operations with PyTorch, for `torch.compile`, fake tensors and autograd."""

from __future__ import annotations

import torch

NAMESPACE = "dalle_kernels_triton"
_library = torch.library.Library(NAMESPACE, "DEF")


def register(schema, implementation, fake):
    """Registers the operation of `schema`, "name(arguments) -> results", and returns it."""
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default
