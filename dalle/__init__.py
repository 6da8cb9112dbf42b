"""DALL·E 1: a discrete VAE, a sparse transformer prior, and what is needed to train them and to draw with them."""

from dalle.errors import UserError

__all__ = ["UserError"]
