"""Safetensors and JSON from untrusted files; atomic writing.

No code in a file is executed, and nothing is allocated for sizes that a file only declares. A
damaged or malicious file raises a ``ValueError`` that names it. The package ``safetensors``
validates a file's header and reads its tensors. Files are written here, one tensor at a time, since
``safetensors`` writes a dict of all of them.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import io
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import ml_dtypes
import numpy as np

MAX_JSON = 16 * 2**20  # bytes
_MAX_HEADER = 100_000_000  # bytes; the limit of the package safetensors
_CHUNK = 8 * 2**20
_DUPLICATE = "an object has a duplicate key"

# The dtypes that weights are computed in, by their names in the format.
FLOATS = {
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
_NAMES = {dtype: name for name, dtype in FLOATS.items()}


class Spec(NamedTuple):
    """A header's description of one tensor."""

    dtype: str  # the format's name: "F32", "BF16", ...
    shape: tuple[int, ...]
    nbytes: int
    start: int = 0  # offset of the first byte in the file


class TensorFile:
    """A safetensors file that is open for reading, with a validated header; a context manager.

    Args:
      path: path of the file.
      max_header: maximum size of the header in bytes; parsed, it takes about ten times the memory.

    Attributes:
      specs: ``{name: Spec}`` in the order of the data.
      metadata: ``{name: text}``, the header's ``__metadata__``.

    Raises:
      FileNotFoundError: the file does not exist.
      ModuleNotFoundError: the package ``safetensors`` is not installed.
      ValueError: the file is not a safetensors file, or is damaged or malicious.
    """

    def __init__(self, path: str | os.PathLike[str], max_header: int = _MAX_HEADER) -> None:
        self.path = Path(path)
        with contextlib.ExitStack() as stack:
            self._file = stack.enter_context(open_regular(self.path))
            length = int.from_bytes(self._file.read(8), "little")
            if length > max_header:
                raise ValueError(
                    f"`{path}`: is not a safetensors file, since its header would have {length} "
                    f"bytes, and the limit is {max_header}; save it again."
                )
            with self._opened("is not a safetensors file, or is damaged"):
                pass
            # The package keeps the offsets to itself and accepts duplicate names.
            header = parse_json(self._file.read(length), path)
            self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
            self.specs: dict[str, Spec] = {}
            try:
                for name in sorted(header, key=lambda name: header[name]["data_offsets"]):
                    dtype, shape = header[name]["dtype"], tuple(header[name]["shape"])
                    begin, end = header[name]["data_offsets"]
                    self.specs[name] = Spec(dtype, shape, end - begin, 8 + length + begin)
            except TypeError as error:  # the package accepts lists of an object's values
                raise ValueError(
                    f"`{path}`: a tensor's entry must be a JSON object; save it again."
                ) from error
            self._close = stack.pop_all().close

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def read(self, name: str, dtypes: Collection[str] = tuple(FLOATS)) -> np.ndarray:
        """Return the tensor ``name``.

        Args:
          name: name of the tensor.
          dtypes: the dtypes that it may have, by their names in the format.

        Raises:
          ValueError: it has another dtype, or more axes or elements than NumPy's arrays can have;
            or the file was replaced since it was opened.
        """
        dtype = self.specs[name].dtype
        if dtype not in dtypes:
            raise ValueError(
                f"`{self.path}`: {name!r} has dtype {dtype}, but only {', '.join(dtypes)} can be "
                "computed with; convert or dequantise it first."
            )
        with self._opened(f"{name!r} cannot be read") as tensors:
            array = tensors.get_tensor(name)
        if not self.is_current():
            raise ValueError(f"`{self.path}`: changed while it was read; read it again.")
        return array

    def chunks(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of the tensor ``name``, of any dtype, in chunks of 8 MiB."""
        spec = self.specs[name]
        self._file.seek(spec.start)
        remaining = spec.nbytes
        while remaining:
            data = self._file.read(min(remaining, _CHUNK))
            if not data:
                raise ValueError(
                    f"`{self.path}`: changed while it was read, and ends inside {name!r}; read it "
                    "again."
                )
            remaining -= len(data)
            yield data

    @contextlib.contextmanager
    def _opened(self, problem: str) -> Iterator[Any]:
        """Open the file with ``safetensors``; the messages of its errors begin with ``problem``.

        The package maps the file into memory. It is closed after each tensor, since the pages that
        were read would count as this process's memory.
        """
        try:
            from safetensors import SafetensorError, safe_open
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                '`safetensors`: is not installed; pip install "adalora-jax[huggingface]".',
                name=error.name,
            ) from error
        try:
            with safe_open(self.path, "numpy") as tensors:
                yield tensors
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(
                f"`{self.path}`: {problem}: {str(error)[:200]}; save it again."
            ) from error

    def is_current(self) -> bool:
        """Return whether the path still refers to the opened file, not to a replacement."""
        return os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path))


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file for reading; not a pipe or a device, which may be endless.

    Raises:
      FileNotFoundError: the path does not exist.
      ValueError: the path is not a regular file, or cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise ValueError(
            f"`{path}`: cannot be opened: {error}; pass the path of a readable file."
        ) from None
    file = os.fdopen(descriptor, "rb") if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
    if file is None:
        os.close(descriptor)
        raise ValueError(f"`{path}`: is not a regular file; put a file in its place.")
    return file


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the JSON object in a file of at most 16 MiB.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is too large, or does not contain a valid JSON object.
    """
    with open_regular(Path(path)) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_JSON:
            raise ValueError(
                f"`{path}`: has {size} bytes, but at most {MAX_JSON} can be read; shorten the file."
            )
        return parse_json(file.read(MAX_JSON), path)


def parse_json(data: bytes, source: object) -> dict[str, Any]:
    """Return the JSON object in ``data``; raise for duplicate keys, NaN, and excessive nesting.

    >>> parse_json(b'{"r": 8}', "adapter_config.json")
    {'r': 8}
    >>> parse_json(b"[1, 2]", "adapter_config.json")
    Traceback (most recent call last):
        ...
    ValueError: `adapter_config.json`: does not contain a JSON object; save it again.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError(_DUPLICATE)
        return result

    def reject(constant: str) -> NoReturn:
        raise ValueError(constant)

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=reject)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"`{source}`: contains invalid JSON: {str(error)[:200]}; save it again."
        ) from None
    if not isinstance(value, dict):
        raise ValueError(f"`{source}`: does not contain a JSON object; save it again.")
    return value


def save_tensors(file: BinaryIO, tensors: Mapping[str, np.ndarray]) -> None:
    """Write arrays as a safetensors file with the metadata that PyTorch's tools expect.

    Raises:
      ValueError: an array has a dtype that is not in ``FLOATS``.
    """
    for name, array in tensors.items():
        if array.dtype not in _NAMES:
            raise ValueError(
                f"`tensors[{name!r}]`: has dtype {array.dtype}, but only "
                f"{', '.join(map(str, _NAMES))} can be written; cast it to one of them."
            )
    # Wide dtypes first, so that every tensor is aligned to its dtype.
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    specs = {name: spec_of(tensors[name]) for name in order}
    stream_tensors(file, specs, lambda name: [to_bytes(tensors[name])], {"format": "pt"})


def stream_tensors(
    file: BinaryIO,
    specs: Mapping[str, Spec],
    data: Callable[[str], Iterable[bytes]],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file one tensor at a time, so that memory need not hold all of them.

    Args:
      file: a file that is open for writing.
      specs: ``{name: Spec}`` of the tensors, in the order of the data; ``start`` is ignored.
      data: function that returns the bytes of a tensor by its name, in chunks.
      metadata: the header's ``__metadata__``.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, spec in specs.items():
        end = offset + spec.nbytes
        header[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in specs:
        for chunk in data(name):
            file.write(chunk)


def spec_of(array: np.ndarray) -> Spec:
    """Return the header's description of an array.

    >>> spec_of(np.zeros((2, 3), np.float16))
    Spec(dtype='F16', shape=(2, 3), nbytes=12, start=0)
    """
    return Spec(_NAMES[array.dtype], array.shape, array.nbytes)


def to_bytes(array: np.ndarray) -> bytes:
    """Return the elements of an array in the order of the format: C order, little endian."""
    return array.astype(array.dtype.newbyteorder("<"), order="C", copy=False).tobytes()


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file that must not exist yet; on exit, wait until its data are on disk."""
    with open(path, "xb") as file:
        yield file
        sync(file)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Create a temporary folder that is renamed to ``path`` on exit, or removed after an error.

    Temporary folders that killed processes left for the same ``path`` are removed first.

    Raises:
      ValueError: ``path`` exists and is not an empty folder.
    """
    taken = path.is_symlink() or (path.exists() and not path.is_dir())
    if taken or (path.exists() and any(path.iterdir())):
        raise ValueError(f"`{path}`: exists and is not empty; name another folder.")
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in leftovers(path):
        shutil.rmtree(old, ignore_errors=True)
    temporary = temporary_path(path)
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, _ in os.walk(temporary):
            sync_folder(Path(folder))
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def writing_to(argument: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Add the argument's name and value to the messages of file system errors.

    >>> with writing_to("directory", "/full/disk"):
    ...     raise OSError(28, "No space left on device")
    Traceback (most recent call last):
        ...
    OSError: [Errno 28] `directory='/full/disk'`: cannot be written: No space left on device; name \
a folder in which files can be made.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # raised by this library, with its own message
            raise
        raise OSError(
            error.errno,
            f"`{argument}={os.fspath(path)!r}`: cannot be written: {error.strerror}; name a folder "
            "in which files can be made.",
        ) from error


def folder_path(name: str, folder: str | os.PathLike[str]) -> Path:
    """Return the argument ``name``, a folder, as a path.

    Raises:
      ValueError: it is empty, which would be the current folder.

    >>> folder_path("directory", "adapters").name
    'adapters'
    """
    if not os.fspath(folder):
        raise ValueError(f"`{name}=''`: is empty; pass the path of a folder.")
    return Path(folder)


def sync(file: BinaryIO) -> None:
    """Wait until the file's data are on disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the folder's entries are on disk, if the system supports that for folders."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows, or a folder that may be written but not listed
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Other errors mean that the file system does not support fsync on folders.
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise
    finally:
        os.close(descriptor)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal digits."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def resolve_within(folder: Path, name: object) -> Path:
    """Return the path of the file ``name`` in ``folder``, which must not resolve outside of it.

    Links into ``blobs``, the sibling folder of ``snapshots``, are allowed, since the download cache
    of Hugging Face consists of them.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: ``name`` is not a plain relative name, or a link leads out of the folder.

    >>> resolve_within(Path("."), "../secret")
    Traceback (most recent call last):
        ...
    ValueError: `.`: '../secret' is not the name of a file in this folder; name one that is.
    """
    if (
        not isinstance(name, str)
        or not name.isprintable()
        or any(mark in name for mark in "\\:")
        or any(part in ("", ".", "..") for part in name.split("/"))
    ):
        raise ValueError(
            f"`{folder}`: {str(name)[:99]!r} is not the name of a file in this folder; name one "
            "that is."
        )
    try:
        real, home = (folder / name).resolve(strict=True), folder.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(
                f"`{folder / name}`: does not exist; pass a folder that has this file."
            ) from None
        raise ValueError(
            f"`{folder / name}`: cannot be opened: {error}; pass the path of a readable file."
        ) from None
    roots = [home]
    if home.parent.name == "snapshots":
        roots.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(root) for root in roots):
        raise ValueError(
            f"`{folder / name}`: is a link to {real}, outside of its folder; copy the file there."
        )
    return folder / name


def temporary_path(path: Path) -> Path:
    """Return a new name for a temporary file or folder in the folder of ``path``."""
    return path.parent / f".{path.name}.{secrets.token_hex(8)}.tmp"


def leftovers(path: Path) -> list[Path]:
    """Return the temporary files or folders that killed processes left next to ``path``.

    >>> leftovers(Path("model.safetensors"))
    []
    """
    return sorted(path.parent.glob(f".{glob.escape(path.name)}.*.tmp"))
