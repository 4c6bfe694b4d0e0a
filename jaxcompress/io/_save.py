"""`save` and `load`: one safetensors file, checked to the last byte, never pickled."""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, SequenceKey
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxcompress._paths import leaves_with_paths, path_string, without_value
from jaxcompress._paths import rebuild as rebuild_tree
from jaxcompress.arrays import is_compressed
from jaxcompress.io import _coded
from jaxcompress.io._metadata import array_fields, bit_planes, describe, rebuild

__all__ = ["LoadError", "load", "save"]

_VERSION = 1
_KEY = "jaxcompress"
_DTYPES = {"bool", "bfloat16", "complex64", "float16", "float32", "float64"} | {
    f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)
}


# safetensors has no such type in NumPy: kept as bytes, and their type in the record.
_BYTES = ("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu")


class LoadError(ValueError):
    """A file that is truncated, altered, too new, or no checkpoint of this library.

    >>> import jaxcompress as jc
    >>> issubclass(jc.io.LoadError, ValueError)
    True
    """


def save(path: str | os.PathLike[str], params: Any, *, compress: bool = False) -> None:
    """Writes a tree of arrays, compressed or dense, to one file: safetensors, or coded.

    The leaves of a compressed array are tensors of their own, `a/kernel/values` and
    `a/kernel/scale`; a JSON record in the header has the format's version, the class and
    static fields of each, and a checksum of each tensor and of itself. The file is
    written aside and renamed, so that it is either complete or not there.

    Args:
      path: of the file; its folder must exist.
      params: any pytree whose leaves are arrays or compressed arrays.
      compress: codes each tensor by the entropy of its symbols (zlib's Huffman code, or lzma):
        of bitmaps the gaps between ones, of bit planes the codes. `load` gives the same bits.
        Pruned weights gain most; dense floats hardly anything. No other program reads it.

    Raises:
      TypeError: a leaf that is no array (a function, a random key), with its path.
      ValueError: two leaves of one path.
      OSError: the file cannot be written.

    >>> import tempfile, jax.numpy as jnp, jaxcompress as jc
    >>> params = jc.quantize.quantize({"w": jnp.ones((8, 4))}, {"w": jc.quantize.int4()})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     jc.io.save(folder + "/model.safetensors", params)
    ...     jc.io.load(folder + "/model.safetensors")["w"]
    QuantizedArray(int4[8,4] as float32, axis=(-2,), path='w')
    """
    record, tensors, planes = _collected(params)
    target = Path(path)
    # In the same folder, so that the rename is atomic.
    handle, aside = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    try:
        if compress:
            Path(aside).write_bytes(_coded.encode(record, tensors, planes))
        else:
            record["tensors"] = {name: _checksum(tensor) for name, tensor in tensors.items()}
            text = json.dumps(record, separators=(",", ":"))
            save_file(tensors, aside, {_KEY: text, "digest": _digest(text.encode())})
        os.chmod(aside, 0o666 & ~_umask())
        os.replace(aside, target)
    except BaseException:
        os.unlink(aside)
        raise


def _collected(params: Any) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, Any]]:
    """The record of a tree, its tensors, and which of them are bit planes."""
    tensors: dict[str, np.ndarray] = {}
    planes: dict[str, tuple[int, int]] = {}
    record: dict[str, Any] = {"version": _VERSION, "leaves": {}}
    keys = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_compressed)
    for key_path, leaf in keys:
        name = path_string(key_path)
        if name in record["leaves"]:
            raise ValueError(f"two leaves have the path {name!r}")
        if is_compressed(leaf):
            leaf = leaf.stored()
            entry = describe(leaf)
            if leaf.path != name:
                entry["path"] = leaf.path
            parts = {f"{name}/{field}": value for field, value in array_fields(leaf).items()}
            planes |= {f"{name}/{field}": how for field, how in bit_planes(leaf).items()}
        else:
            entry, parts = {}, {name: leaf}
        named = without_value(key_path)
        if not all(_plain(k) for k in named):
            entry["keys"] = [_plain_key(k) for k in named]
        record["leaves"][name] = entry
        for tensor, value in parts.items():
            if tensor in tensors:
                raise ValueError(f"two tensors have the name {tensor!r}")
            if tensor == "__metadata__":
                raise ValueError("safetensors keeps the name '__metadata__' for itself")
            tensors[tensor] = _array(tensor, value)
            if tensors[tensor].dtype.name in _BYTES:
                record.setdefault("dtypes", {})[tensor] = tensors[tensor].dtype.name
                tensors[tensor] = tensors[tensor].view(np.uint8)
    return record, tensors, planes


def load(path: str | os.PathLike[str], like: Any = None) -> Any:
    """Reads what `save` wrote, to the same bits.

    Args:
      path: of the file.
      like: a tree with the same paths, whose structure the result takes: NNX state, an
        Equinox module. Its leaves do not matter and may be dense where the saved ones
        are compressed. Without it the result is nested dicts and lists.

    Returns:
      The tree of arrays and compressed arrays.

    Raises:
      LoadError: the file is truncated or altered, of a newer version, or no checkpoint of
        this library; or its paths are not those of `like`.
      OSError: the file cannot be read.

    >>> import tempfile, jax.numpy as jnp, jaxcompress as jc
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     jc.io.save(folder + "/model.safetensors", {"layers": [jnp.zeros(2), jnp.ones(1)]})
    ...     jc.io.load(folder + "/model.safetensors")
    {'layers': [Array([0., 0.], dtype=float32), Array([1.], dtype=float32)]}
    """
    record, tensors = _read(path)
    for name, dtype in record.get("dtypes", {}).items():
        if dtype not in _BYTES:
            raise LoadError(f"{path}: {name!r} is of the type {dtype}, which is not known")
        tensors[name] = tensors[name].view(jnp.dtype(dtype))
    entries = record["leaves"]
    dense = {name for name, entry in entries.items() if "class" not in entry}
    leaves = {name: _leaf(name, entry, tensors, dense) for name, entry in entries.items()}
    if like is not None:
        return _fill(path, like, leaves)
    return _nest({name: entry.get("keys") for name, entry in entries.items()}, leaves)


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The record and the tensors of a file of either kind, checked."""
    with open(path, "rb") as stream:  # a missing file is an OSError, not a bad checkpoint
        if stream.read(len(_coded.MAGIC)) == _coded.MAGIC:
            stream.seek(0)
            return _decoded(path, stream.read())
    try:
        with safe_open(path, "np") as file:
            record = _record(file.metadata() or {})
            if set(file.keys()) != set(record["tensors"]):
                raise LoadError(f"{path}: the tensors are not those that were saved")
            tensors = {name: file.get_tensor(name) for name in record["tensors"]}
    except SafetensorError as error:
        raise LoadError(f"{path} is no intact safetensors file: {error}") from error
    except LoadError as error:
        raise LoadError(f"{path}: {error}") from None
    for name, checksum in record["tensors"].items():
        if _checksum(tensors[name]) != checksum:
            raise LoadError(f"{path}: the tensor {name!r} was altered after it was saved")
    return record, tensors


def _decoded(path: Any, data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    try:
        record, entries, begin = _coded.read_head(data)
        _check_version(record)
    except (_coded.CodedError, LoadError) as error:
        raise LoadError(f"{path}: {error}") from None
    return record, _coded.read_tensors(data, entries, begin)


def _record(metadata: dict[str, str]) -> dict[str, Any]:
    text = metadata.get(_KEY)
    if text is None:
        raise LoadError("it has no jaxcompress record; other safetensors files are not read")
    if _digest(text.encode()) != metadata.get("digest"):
        raise LoadError("its record was altered after it was saved")
    record = json.loads(text)
    _check_version(record)
    return record


def _check_version(record: dict[str, Any]) -> None:
    if record["version"] > _VERSION:
        raise LoadError(
            f"it has version {record['version']} of the format, and this library reads up to "
            f"{_VERSION}; upgrade jaxcompress"
        )


def _leaf(name: str, entry: dict[str, Any], tensors: dict[str, np.ndarray], dense: set[str]) -> Any:
    entry = {k: v for k, v in entry.items() if k != "keys"}
    if "class" not in entry:
        return _to_jax(name, tensors[name])
    prefix = name + "/"
    parts = {
        tensor[len(prefix) :]: _to_jax(tensor, value)
        for tensor, value in tensors.items()
        if tensor.startswith(prefix) and "/" not in tensor[len(prefix) :] and tensor not in dense
    }
    original = entry.pop("path", name)
    try:
        return rebuild(entry, parts, original)
    except (KeyError, TypeError, ValueError) as error:
        raise LoadError(f"{name!r} is of a kind that this library does not know: {error}") from None


def _to_jax(name: str, value: np.ndarray) -> jax.Array:
    array = jnp.asarray(value)
    if array.dtype != value.dtype:
        raise LoadError(f"{name!r} is {value.dtype}; enable jax_enable_x64 to load it")
    return array


def _array(name: str, value: Any) -> np.ndarray:
    is_array = isinstance(value, (jax.Array, np.ndarray, np.generic))
    if not is_array or jnp.issubdtype(value.dtype, jax.dtypes.extended):
        raise TypeError(
            f"{name!r} is no plain array but {type(value).__name__}; save the arrays only, for "
            "an Equinox module eqx.filter(model, eqx.is_array)"
        )
    if value.dtype.name not in _DTYPES and value.dtype.name not in _BYTES:
        raise TypeError(f"{name!r} is {value.dtype.name}, which cannot be saved and read back")
    array = np.asarray(value)
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    return np.ascontiguousarray(native).reshape(value.shape)


def _checksum(array: np.ndarray) -> str:
    digest = hashlib.blake2b(digest_size=8)
    digest.update(f"{array.dtype.name}{array.shape}".encode())
    digest.update(array.reshape(-1).view(np.uint8).data if array.size else b"")
    return digest.hexdigest()


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _plain(key: Any) -> bool:
    """Whether the path as text is enough to find the key again."""
    name = key.key if isinstance(key, DictKey) else None
    return isinstance(name, str) and name != "" and "/" not in name


def _plain_key(key: Any) -> Any:
    """A string or number for a name, `[i]` for a position."""
    if isinstance(key, SequenceKey):
        return [key.idx]
    name = getattr(key, "key", getattr(key, "name", key))
    return name if type(name) in (str, int) else str(name)


def _nest(keys: dict[str, Any], leaves: dict[str, Any]) -> Any:
    """Nested dicts and lists from paths."""
    if list(leaves) == [""] and not keys[""]:
        return leaves[""]
    root: dict[Any, Any] = {}
    for name, leaf in leaves.items():
        at, steps = root, keys[name] or name.split("/")
        for step in steps[:-1]:
            at = at.setdefault(tuple(step) if isinstance(step, list) else step, {})
        last = steps[-1]
        at[tuple(last) if isinstance(last, list) else last] = leaf
    return _lists(root)


def _lists(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    children = {k: _lists(v) for k, v in node.items()}
    if children and all(isinstance(k, tuple) for k in children):
        return [children.get((i,)) for i in range(max(children)[0] + 1)]  # None holds no leaf
    return children


def _fill(path: Any, like: Any, leaves: dict[str, Any]) -> Any:
    names = [name for name, _ in leaves_with_paths(like)]
    if set(names) != set(leaves):
        missing, extra = sorted(set(names) - set(leaves)), sorted(set(leaves) - set(names))
        raise LoadError(
            f"{path}: its paths are not those of like; not in the file: {missing}, not in "
            f"like: {extra}"
        )
    return rebuild_tree(like, [leaves[name] for name in names])
