"""Reads weights from files of `torch.save`, which are pickles, without running code from them."""

import io
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from dalle.errors import UserError
from dalle.files import check_regular
from dalle.models.checkpoint import check_shapes, load_weights


def read_module(path: Path, classes: frozenset[str]) -> dict[str, Tensor]:
    """The parameters of a module that was pickled as a whole, in either format of `torch.save`, on the CPU.

    Args:
        path: the file.
        classes: full names of the classes of the module and its submodules. None of them is imported: their instances
            become empty objects with the same attributes.

    Raises:
        UserError: the file is missing or damaged, or names anything but these classes and what tensors are built from.
    """
    _check(path)
    content = io.BytesIO(path.read_bytes())  # in memory, where torch.load does not try the tar files of old releases
    with _damage(path), warnings.catch_warnings(action="ignore"):  # torch compares the sources of the classes
        module = torch.load(content, map_location="cpu", weights_only=False, pickle_module=_restricted(classes))
        return dict(_parameters(module, "", set()))


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict, or of a checkpoint that has one as "state_dict", on the CPU.

    Raises:
        UserError: the file is missing, damaged, or holds more than tensors and plain values.
    """
    zipped = _check(path)
    with _damage(path):
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        state = state.get("state_dict", state)
        return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def take(found: dict[str, Tensor], shapes: Mapping[str, tuple[int, ...]], path: Path) -> dict[str, Tensor]:
    """Removes tensors from `found` and returns them; UserError if one is missing or has another shape."""
    theirs = {name: found.pop(name) for name in shapes if name in found}
    check_shapes({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, theirs, str(path))
    return theirs


def load_renamed(module: nn.Module, found: Mapping[str, Tensor], their_name: Callable[[str], str], path: Path) -> None:
    """Loads tensors into a module under other names.

    Args:
        module: any module.
        found: the tensors of `path`.
        their_name: from a name in the state dict of `module` to the one in `found`.
        path: for errors.

    Raises:
        UserError: a tensor is missing, has another shape, or is not in the module; the message has its name in `found`.
    """
    names = {ours: their_name(ours) for ours in module.state_dict()}
    check_shapes({names[ours]: tensor for ours, tensor in module.state_dict().items()}, found, str(path))
    load_weights(module, {ours: found[theirs] for ours, theirs in names.items()}, str(path))


def _check(path: Path) -> bool:
    """Whether a file is a zip archive; UserError if it is one that `torch.save` does not write."""
    check_regular(path, path)
    if not zipfile.is_zipfile(path):
        return False
    with _damage(path), zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise pickle.UnpicklingError("it is a TorchScript archive")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):  # may expand to any size
            raise pickle.UnpicklingError("it is compressed")
    return True


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turns every exception into a UserError that names the file: a damaged pickle may raise any."""
    try:
        yield
    except Exception as error:
        reason = str(error) or type(error).__name__
        refused = reason.partition("Unsupported global: GLOBAL ")[2].partition(" ")[0]
        fix = "download it again"
        if refused:  # an honest checkpoint may hold the state of callbacks too
            reason, fix = f"it names {refused}, which weights do not need", f"{fix}, or save its state dict alone"
        raise UserError(f"{path} cannot be read as weights ({reason.splitlines()[0]}): {fix}") from error


def _restricted(classes: frozenset[str]) -> Any:
    """A pickle module for `torch.load`, whose unpickler admits `classes`, as empty objects, and tensors only.

    Everything it returns is made for one call, so that a file that sets attributes of a class changes nothing else.
    """

    class Holder:
        """An object of any class, without its methods."""

        dump_patches = False  # torch.load asks for it, before it writes the difference of two sources to a file

    def tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
        return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, False, OrderedDict())

    def parameter(data: Tensor, *_: Any) -> Tensor:
        return data

    admitted: dict[str, Any] = dict.fromkeys(classes, Holder) | {
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch._utils._rebuild_parameter": parameter,
        "torch.device": lambda *kind: None,
        "collections.OrderedDict": OrderedDict,
        "builtins.set": set,
    }

    class Unpickler(pickle._Unpickler):  # the one in C allocates what a file of a few bytes asks for
        def find_class(self, module: str, name: str) -> Any:
            full = f"{module}.{name}".replace("__builtin__.", "builtins.")
            if full not in admitted:
                raise pickle.UnpicklingError(f"it names {full}, which weights do not need")
            return admitted[full]

    def load(file: Any, **options: Any) -> Any:
        return Unpickler(file, **options).load()

    return SimpleNamespace(__name__="restricted pickle", Unpickler=Unpickler, load=load)


def _parameters(module: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if id(module) in seen:  # following shared modules may take forever
        raise pickle.UnpicklingError(f"the module {prefix} occurs twice")
    seen.add(id(module))
    for name, tensor in vars(module)["_parameters"].items():
        if isinstance(tensor, Tensor):
            yield f"{prefix}{name}", tensor
    for name, child in vars(module)["_modules"].items():
        yield from _parameters(child, f"{prefix}{name}.", seen)
