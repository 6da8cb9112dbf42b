"""Reports the installation, the build, the machine, and the backend of each operation with the reasons against others.

python -m dalle_kernels.info [--json]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform

import torch

from . import __version__, backends, build_info

# The problem for which each operation is reported: DALL·E's head dim, in float32.
_SAMPLE = {
    "sparse_attention": (1, 1, 1, 64),
    "decode_attention": (1, 1, 64),
    "gumbel_softmax": (1, 8192),
    "sample_tokens": (1, 8192),
}


def _package_version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _build():
    """Build information and instruction sets, or why they are unknown."""
    try:
        return {
            **build_info.build_info(),
            "cpu_isas_here": [name for name, supported in build_info.cpu_isas().items() if supported],
            "cpu_isa_active": build_info.active_isa(),
            "cpu_isa_reason": build_info.isa_reason(),
        }
    except OSError as error:
        return {"problem": str(error)}


def _choice(operation, device):
    """The backend that runs `operation` on `device`, and the reasons against those before it."""
    sample = torch.empty(_SAMPLE[operation], device=device)
    refused = {}
    for name, backend in backends.BACKENDS.items():
        reasons = backend.reasons(operation, sample)
        if backends.forced() not in (None, name):
            reasons = (f"{backends.forced()} is forced", *reasons)
        if not reasons:
            return {"backend": name, "refused": refused}
        refused[name] = "; ".join(reasons)
    return {"backend": None, "refused": refused}


def collect() -> dict:
    """The whole report as a dict of plain values."""
    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return {
        "dalle_kernels": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "triton": _package_version("triton"),
        "devices": {d: torch.cuda.get_device_name(d) if d != "cpu" else platform.processor() or "cpu" for d in devices},
        "build": _build(),
        "libraries": {
            name: backend.problem or "loaded" for name, backend in backends.BACKENDS.items() if name != "reference"
        },
        "forced_backend": backends.forced(),
        "operations": {op: {device: _choice(op, device) for device in devices} for op in backends.OPERATIONS},
    }


def _print(value, indent=0):
    for key, item in value.items():
        if isinstance(item, dict):
            print(f"{'  ' * indent}{key}:")
            _print(item, indent + 1)
        else:
            shown = ", ".join(map(str, item)) if isinstance(item, list) else item
            print(f"{'  ' * indent}{key}: {shown}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dalle_kernels.info", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    info = collect()
    if parser.parse_args().json:
        print(json.dumps(info, indent=2))
    else:
        _print(info)


if __name__ == "__main__":
    main()
