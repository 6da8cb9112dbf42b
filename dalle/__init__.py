"""DALL·E 1: a discrete VAE, a sparse transformer prior, and what is needed to train them and to draw with them."""

from importlib import import_module

from dalle.errors import UserError
from dalle.extras import extras

# The models need torch; they are imported when first asked for, so that `import dalle` stays instant.
_LAZY = {
    "CLIP": "dalle.clip",
    "CLIPConfig": "dalle.clip",
    "DiscreteVAE": "dalle.dvae",
    "DiscreteVAEConfig": "dalle.dvae",
    "Pipeline": "dalle.pipeline",
    "Prior": "dalle.prior",
    "PriorConfig": "dalle.prior",
}

__all__ = ["UserError", *sorted(_LAZY)]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'dalle' has no attribute {name!r}")
    with extras():
        return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
