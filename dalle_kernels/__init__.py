"""Sparse attention, fused Gumbel-softmax and cached decode kernels for DALL·E 1, with the same results on every
backend.
"""

from . import nn
from .backends import use_backend
from .decode_attention import decode_attention
from .decode_cache import DecodeCache
from .gumbel_softmax import gumbel_softmax
from .patch import Patch, patch
from .patterns import AttentionPattern
from .prepare import prepare
from .sample_tokens import sample_tokens
from .sparse_attention import sparse_attention
from .version import __version__ as __version__

__all__ = [
    "AttentionPattern",
    "DecodeCache",
    "Patch",
    "decode_attention",
    "gumbel_softmax",
    "nn",
    "patch",
    "prepare",
    "sample_tokens",
    "sparse_attention",
    "use_backend",
]
