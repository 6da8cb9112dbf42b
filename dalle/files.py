"""Atomic file writes, locks, and reads that believe nothing: errors name the file and the problem."""

import fcntl
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dalle.errors import UserError

MAX_TEXT = 64 << 20  # bytes; a tokenizer of half a million tokens has 30 MB
MAX_JSON = 1 << 20  # bytes of a configuration; parsed, it may take 30 times that
SAMPLES = "samples"  # the folder of a model directory for images made in the course of training
METADATA = "dalle"  # key of a safetensors file's metadata: safetensors writes several keys in random order
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "U8": torch.uint8, "BOOL": torch.bool,
}  # of safetensors  # fmt: skip


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path, which replaces `path` atomically and synced to disk when the block exits normally.

    If the block raises, the previous file is kept. A failed write raises a UserError.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:48]}.{os.getpid()}.tmp")  # no longer than a name may be, as `path` may be
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be written ({error}); the previous file is intact: free disk space or choose another path"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def sole_writer(directory: Path, *stems: str) -> Iterator[None]:
    """Holds the lock of `directory` for the files whose names begin with `stems`; the first stem names the lock.

    The lock ends with its process. Temporary files that a killed writer left are removed. Raises a UserError if another
    process, or another thread, holds the lock.
    """
    path = directory / f".{stems[0]}.lock"
    try:
        # Neither through a symbolic link nor waiting for the other end of a pipe, which a stranger may have put there.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        lock = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): choose another directory") from error
    with lock:
        check_regular(lock.fileno(), path)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is writing {stems[0]} in {directory}: wait until it ends, or choose another directory"
            ) from None
        except OSError:
            pass  # a file system without locks
        for folder in (directory, directory / SAMPLES):
            for leftover in chain.from_iterable(folder.glob(f".{stem}*.tmp") for stem in stems):
                if not folder.is_symlink():
                    leftover.unlink(missing_ok=True)
        yield


def writable_directory(path: Path) -> Path:
    """Creates the directory `path` if needed and returns it; raises a UserError if it is not writable."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise UserError(
            f"{path} is not a directory that can be written to ({error.strerror}); choose another"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_text(path: Path, max_bytes: int = MAX_TEXT) -> str:
    """Reads a UTF-8 text file; raises a UserError that names the file if it is missing, something else, or larger."""
    size = check_regular(path, path)
    if size > max_bytes:
        raise UserError(f"{path} is damaged: it has {size:,} bytes, and at most {max_bytes:,} make sense")
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text: {error}") from error


def write_json(path: Path, data: Any) -> None:
    """Writes JSON, atomically."""
    write_text(path, json.dumps(data, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Parses a JSON file; raises a UserError that names the file if it is missing or invalid."""
    return parse_json(read_text(path, MAX_JSON), path)


def parse_json(text: str, origin: Path) -> Any:
    """Parses JSON from the file `origin`; raises a UserError that names it if the JSON is invalid."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{origin} cannot be read as JSON: {error}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors, from any device, as a safetensors file with a digest of its content, atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = dict(metadata or {})
    described = json.dumps(metadata | {"digest": _content_digest(tensors, metadata)}, sort_keys=True)
    with atomic_write(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # the umask's mode: safetensors makes files that only their owner can read
        save_file(tensors, temporary, {METADATA: described})
        temporary.chmod(mode)


def read_header(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the header of a safetensors file: its tensors, on the meta device, and metadata. Errors: `read_tensors`."""
    with _open_tensors(path) as file:
        return _header(file), _metadata(file)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a safetensors file: tensors on the CPU, and metadata.

    Raises a UserError if it is missing, not a regular file, or damaged: whatever differs from what `write_tensors`
    wrote. Files without a digest, from earlier versions, are believed if their header is valid.
    """
    with _open_tensors(path) as file:
        tensors, metadata = {name: file.get_tensor(name) for name in _header(file)}, _metadata(file)
    if metadata.pop("digest", None) not in (None, _content_digest(tensors, metadata)):
        raise UserError(f"{path} is damaged: its content is not what was written; create it again")
    return tensors, metadata


def digest(text: str) -> str:
    """A short fingerprint of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def _open_tensors(path: Path) -> Iterator[Any]:
    check_regular(path, path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError, RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path} is damaged or not a safetensors file ({error}): create it again") from error


def _header(file: Any) -> dict[str, Tensor]:
    header = {}
    for name in file.keys():  # noqa: SIM118
        entry = file.get_slice(name)
        if entry.get_dtype() not in DTYPES:
            raise SafetensorError(f"{name} has the type {entry.get_dtype()}, which is never written")
        header[name] = torch.empty(entry.get_shape(), dtype=DTYPES[entry.get_dtype()], device="meta")
    return header


def _metadata(file: Any) -> dict[str, str]:
    written = file.metadata() or {}
    metadata = json.loads(written[METADATA]) if METADATA in written else written  # files of earlier versions
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are not text by name")
    if METADATA in written and "digest" not in metadata:
        raise ValueError("its digest is missing")
    return metadata


def _content_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    content = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        content.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        content.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()


def check_regular(file: Path | int, path: Path) -> int:
    """The size of a regular file, given by its path or as an open descriptor; raises a UserError for others."""
    try:
        status = os.stat(file)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait forever
        raise UserError(f"{path} is not a regular file: remove it, or choose another directory")
    return status.st_size


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
