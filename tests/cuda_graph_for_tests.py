"""CUDA graphs without a GPU: capture records operations, and replay runs exactly these again."""

import contextlib
import operator
import types

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class Graph(TorchDispatchMode):
    """A stand-in for torch.cuda.CUDAGraph. Values that Python computes during capture are frozen, as in a real graph.
    Tensors that the recorded operations wrote are restored, because capturing runs nothing."""

    def __init__(self):
        super().__init__()
        self.calls, self.replays, self._before = [], 0, {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        for argument, value in zip(operation._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._before.setdefault(id(value), (value, value.clone()))
        result = operation(*args, **(kwargs or {}))
        self.calls.append((operation, args, kwargs or {}, result))
        return result

    def __exit__(self, *error):
        super().__exit__(*error)
        for value, before in self._before.values():
            value.copy_(before)

    @torch.autocast("cpu", enabled=False)  # recorded operations have been cast already
    def replay(self):
        self.replays += 1
        now = {}
        for operation, args, kwargs, recorded in self.calls:
            args, kwargs = tree_map(lambda x: now.get(id(x), x) if isinstance(x, Tensor) else x, (args, kwargs))
            result = operation(*args, **kwargs)
            now.update((id(old), new) for old, new in zip(tree_leaves(recorded), tree_leaves(result), strict=True))

    def tensors(self):
        """All input and output tensors of an operation."""
        return [x for x in tree_leaves([call[1:] for call in self.calls]) if isinstance(x, Tensor)]


def stand_in(monkeypatch) -> list[Graph]:
    """Replaces the graph functions of `torch.cuda`; returns the list to which created graphs are added."""
    graphs = []

    def new_graph():
        graphs.append(Graph())
        return graphs[-1]

    def new_stream(device):
        return types.SimpleNamespace(wait_stream=lambda other: None)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", new_graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream, capture_error_mode: graph)
    monkeypatch.setattr(torch.cuda, "Stream", new_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", new_stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return graphs


class WithoutDevice(TorchFunctionMode):
    """Replaces Tensor methods that query the current device, which fails in a torch without CUDA, with operations."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return _WITHOUT_DEVICE.get(function, function)(*args, **(kwargs or {}))


def _index(x, index):
    dim = 0
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, slice):
            x = torch.ops.aten.slice(x, dim, part.start, part.stop, part.step or 1)
        elif part is None:
            x = x.unsqueeze(dim)
        else:
            x = x.select(dim, operator.index(part))  # reads a tensor's value, as PyTorch does
            continue
        dim += 1
    return x


_WITHOUT_DEVICE = {
    Tensor.__getitem__: _index,
    Tensor.__int__: torch.ops.aten._local_scalar_dense,
    Tensor.copy_: torch.ops.aten.copy_,
}
