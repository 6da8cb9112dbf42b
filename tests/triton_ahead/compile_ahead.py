"""Compiles the Triton kernels of an operation for a GPU that need not be present. Needs a separate process.

An operation of PROBLEMS is called on CPU tensors. Where it would start a kernel, the kernel is compiled: with these
arguments, and the line that launch.TABLE has for the target (sm_80, gfx942, ...).
"""

import os
import re
import subprocess
import tempfile
from pathlib import Path

os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # explicit, because Triton 3.9 warns that the default will change

import torch
import triton
from triton.backends.compiler import GPUTarget

import dalle_kernels as dk
from dalle_kernels.backends.plans import plan_tensors
from dalle_kernels.backends.triton import launch

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
INSTRUCTIONS = ("HMMA", "HGMMA", "UTCHMMA", "LDGSTS", "LDL", "STL")  # of NVIDIA GPUs, to count


def sparse_attention(dtype, head_dim, heads=2):
    """Forward and backward, for a pattern with split tiles."""
    from dalle_kernels.backends.triton import sparse_attention as module

    pattern = dk.AttentionPattern.causal(256, (32, 32))
    q = torch.zeros(1, heads, pattern.seq_len, head_dim, dtype=dtype)
    plans = plan_tensors(pattern, pattern.seq_len, q.device, launch.tiles(q.device, head_dim, dtype))
    out, lse = module._sparse_attention(q, q, q, *plans, 0.1)
    module._sparse_attention_backward(q, q, q, q, out, lse, *plans, 0.1)


def sparse_attention_of_one_head(dtype, head_dim):
    """One head: Triton compiles sizes of 1 as constants."""
    sparse_attention(dtype, head_dim, heads=1)


def gumbel_softmax(dtype, classes):
    """Soft and hard, with the KL, forward and backward, along either dimension of a matrix; in two passes with many
    classes.
    """
    from dalle_kernels.backends.triton import gumbel_softmax as module

    seed, tau = torch.tensor(1), torch.tensor(1.0)
    for shape, dim in (((classes, 100), 0), ((100, classes), 1)):
        x = torch.zeros(shape, dtype=dtype)
        for hard in (False, True):
            y, kl, stats = module._gumbel_softmax(x, seed, tau, hard, dim, True)
            module._gumbel_softmax_backward(x, kl, None if hard else y, x, kl, stats, seed, tau, hard, dim)


def sample_tokens(dtype, vocabulary):
    from dalle_kernels.backends.triton import sample_tokens as module

    rows = torch.arange(3)
    module._sample_tokens(torch.zeros(3, vocabulary, dtype=dtype), rows, rows, 0.5, 10, 0.9)


def decode_attention(dtype, head_dim):
    """A step of many candidates."""
    from dalle_kernels.backends.triton import decode_attention as module

    pattern = dk.AttentionPattern.row(256, (32, 32))
    sizes = dict(prompts=2, candidates=32, heads=4, head_dim=head_dim, dtype=dtype, device="cpu")
    cache = dk.DecodeCache([pattern], **sizes)
    layer = cache.layer(0)
    storage = layer.prefix_k, layer.prefix_v, layer.image_k, layer.image_v
    q = torch.zeros(cache._shape, dtype=dtype)
    module._decode_attention(q, q, q, *storage, layer.schedule, cache.step, 0.1)


PROBLEMS = {
    f.__name__: f
    for f in (sparse_attention, sparse_attention_of_one_head, gumbel_softmax, sample_tokens, decode_attention)
}


class Driver:
    """The driver interface that Triton queries before it compiles."""

    def __init__(self, target):
        kind, number = target.split("_") if target.startswith("sm_") else ("hip", target)
        self.target = GPUTarget("hip", number, 64) if kind == "hip" else GPUTarget("cuda", int(number), 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return str(self.target)  # compiled kernels are cached per target

    def get_current_stream(self, device):
        return 0


def compile_for(target, problem):
    """[resources of a compiled kernel]; launches with other constants count as other kernels"""
    compiled = {}

    def compile(kernel, blocks, warps, stages, *arguments, **constants):
        assert blocks, "the problem must start every kernel"
        options = dict(num_warps=warps, num_stages=stages)
        result = kernel.warmup(*arguments, grid=(blocks,), **constants, **options)
        compiled[result.hash] = result

    launch.start, launch.architecture = compile, lambda device: target
    triton.runtime.driver.set_active(Driver(target))
    problem()
    look = amd_resources if target.startswith("gfx") else nvidia_resources
    return [
        {"kernel": kernel.name, "shared": kernel.metadata.shared, **look(kernel.asm)} for kernel in compiled.values()
    ]


def nvidia_resources(asm):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        environment = {**os.environ, "PATH": f"{TOOLS}:{os.environ['PATH']}"}  # cuobjdump calls nvdisasm
        command = [TOOLS / "cuobjdump", "-res-usage", "-sass", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    registers, stack, local = (int(re.search(rf"{word}:(\d+)", listing)[1]) for word in ("REG", "STACK", "LOCAL"))
    counts = {name: len(re.findall(rf"\b{name}\b", listing)) for name in INSTRUCTIONS}
    return {"registers": registers, "spilled": stack + local + counts.pop("LDL") + counts.pop("STL"), **counts}


def amd_resources(asm):
    text = asm["amdgcn"]
    find = lambda word: int(re.search(rf"\.{word}:\s+(\d+)", text)[1])  # noqa: E731
    spilled = find("vgpr_spill_count") + find("sgpr_spill_count") + find("private_segment_fixed_size")
    return {"registers": find("vgpr_count"), "spilled": spilled, "MFMA": len(re.findall(r"\bv_mfma_", text))}


def compile_problem(operation, dtype, size, *targets):
    """{target: the result of compile_for, for an operation, a dtype by name, and a head dim or number of classes}"""
    problem = PROBLEMS[operation]
    return {target: compile_for(target, lambda: problem(getattr(torch, dtype), size)) for target in targets}
