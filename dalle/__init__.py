"""DALL·E 1: a discrete VAE and a sparse transformer prior, with training, image generation and evaluation."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dalle.errors import UserError
from dalle.extras import extras

if TYPE_CHECKING:  # for editors and type checkers
    from dalle.conversion.convert import convert
    from dalle.generation.pipeline import Pipeline
    from dalle.models.clip import CLIP, CLIPConfig
    from dalle.models.dvae import DiscreteVAE, DiscreteVAEConfig
    from dalle.models.prior import Prior, PriorConfig
    from dalle.tokenizer import Tokenizer

__all__ = [
    "CLIP",
    "CLIPConfig",
    "DiscreteVAE",
    "DiscreteVAEConfig",
    "Pipeline",
    "Prior",
    "PriorConfig",
    "Tokenizer",
    "UserError",
    "convert",
]

# The models need torch. They are imported on first use, so that `import dalle` stays fast.
_LAZY = {
    "CLIP": "dalle.models.clip",
    "CLIPConfig": "dalle.models.clip",
    "DiscreteVAE": "dalle.models.dvae",
    "DiscreteVAEConfig": "dalle.models.dvae",
    "Pipeline": "dalle.generation.pipeline",
    "Prior": "dalle.models.prior",
    "PriorConfig": "dalle.models.prior",
    "Tokenizer": "dalle.tokenizer",
    "convert": "dalle.conversion.convert",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'dalle' has no attribute {name!r}")
    with extras():
        return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
