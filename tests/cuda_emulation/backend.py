"""The emulated CUDA kernels as a backend, `emulated`, with the plans, gradients and launchers of `cuda`."""

from __future__ import annotations

import torch

from dalle_kernels.backends import OPERATIONS
from dalle_kernels.backends.autograd import gumbel_softmax, sparse_attention
from dalle_kernels.backends.base import Backend
from dalle_kernels.backends.native.tiles import TILES

from . import emulated


class EmulatedOperation:
    """A registered operation whose calls are checked by the emulation."""

    def __init__(self, name, backend):
        self._name, self._backend = name, backend

    def name(self):
        return f"dalle_kernels_emulated::{self._name}"

    def __call__(self, *arguments):
        return emulated.run(self._name, *arguments, capability=self._backend.capability)


class EmulatedBackend(Backend):
    """Compiles the library when first asked.

    Attributes:
        capability: what the device claims to be.
    """

    name = "emulated"
    devices = ("cpu",)
    capability = 90

    @property
    def problem(self):
        if not self.operations:
            emulated.library()
            ops = {name: EmulatedOperation(name, self) for name in OPERATIONS}
            for module, tiles in ((sparse_attention, [self.tiles]), (gumbel_softmax, [])):
                name = module.__name__.rpartition(".")[2]
                backward = EmulatedOperation(f"{name}_backward", self)
                ops[name] = module.register_autograd(ops[name], backward, *tiles)
            self.operations = ops
        return None

    def tiles(self, device: torch.device, head_dim: int, dtype: torch.dtype):
        return TILES["cuda"]


EMULATED = EmulatedBackend()
