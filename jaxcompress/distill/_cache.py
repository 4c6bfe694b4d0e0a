"""A teacher's answers on disk: computed once, read by memory map, complete or not there."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax  # which has taught NumPy the name bfloat16
import numpy as np

from jaxcompress._paths import path_string

__all__ = ["CacheError", "cache_teacher", "open_cache"]

_VERSION = 1


class CacheError(ValueError):
    """A cache that is altered, incomplete, of another teacher, or no cache at all.

    >>> import jaxcompress as jc
    >>> issubclass(jc.distill.CacheError, ValueError)
    True
    """


def cache_teacher(
    path: str | os.PathLike[str],
    teacher: Callable[[Any], Any],
    batches: Sequence[Any],
    *,
    about: Any = None,
    progress: Callable[[], None] | None = None,
) -> None:
    """Runs a teacher over batches and stores what it answers.

    It writes to `path` with `.partial` at its end, a batch and its checksum at a time, and
    renames when all are there. Called again after a crash it goes on where it stopped;
    called again after it is done it returns at once.

    Args:
      path: of a folder that will be made.
      teacher: `teacher(batch)` returns arrays `[examples, ...]`, one or a tree of them:
        logits, what `top_k` makes of them, features.
      batches: a sequence; which batches, and in which order, must be the same when it
        goes on.
      about: what they come from, anything that JSON can say: a name, a checksum, a
        temperature. A cache that says something else raises.
      progress: called after each batch, also one that was there already.

    Raises:
      CacheError: what is there says something else in `about`, or was altered.
      ValueError: no batches, or answers that are no arrays of one number of examples.
      OSError: it cannot be written.

    >>> import tempfile, jax.numpy as jnp, jaxcompress as jc
    >>> batches = [jnp.ones((2, 3)), jnp.zeros((1, 3))]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     jc.distill.cache_teacher(folder + "/logits", lambda x: x + 1, batches)
    ...     jc.distill.open_cache(folder + "/logits")[:, 0]
    memmap([2., 2., 1.], dtype=float32)
    """
    about = json.loads(json.dumps(about))
    target = Path(path)
    if target.exists():
        _say_the_same(target, _read(target)["about"], about)
        for _ in batches:
            _tick(progress)
        return
    if not len(batches):
        raise ValueError("there are no batches to cache")
    aside = target.with_name(target.name + ".partial")
    aside.mkdir(exist_ok=True)
    record = _resumed(aside, about)
    for number, batch in enumerate(batches):
        if number >= len(record["batches"]):
            _append(aside, record, teacher(batch))
        _tick(progress)
    if len(record["batches"]) != len(batches):
        raise CacheError(
            f"{aside} has {len(record['batches'])} batches, and there are {len(batches)}; it was "
            "begun with others: remove it"
        )
    os.replace(aside, target)
    _sync(target.parent)


def open_cache(path: str | os.PathLike[str], like: Any = None, *, verify: bool = True) -> Any:
    """Opens what `cache_teacher` stored, as memory maps: nothing is read until it is used.

    Args:
      path: of the folder.
      like: a tree whose structure the result takes, as
        `jax.eval_shape(teacher, batches[0])`. Without it the result is the array if there
        is one, a dict by paths if there are several.
      verify: reads everything once and compares checksums.

    Returns:
      Read-only arrays `[examples, ...]` of all batches in their order; index them with a
      batch of numbers, `cache[index]`, and give that to a jitted step.

    Raises:
      CacheError: it is altered or incomplete, or not like `like`.
      OSError: it cannot be read.

    >>> import tempfile, jax, jax.numpy as jnp, jaxcompress as jc
    >>> teacher, batches = lambda x: jc.distill.top_k(x, 2), [jnp.ones((4, 9))]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     jc.distill.cache_teacher(folder + "/top", teacher, batches)
    ...     like = jax.eval_shape(teacher, batches[0])
    ...     jc.distill.open_cache(folder + "/top", like).indices.shape
    (4, 2)
    """
    target = Path(path)
    record = _read(target)
    if verify:
        _verify(target, record)
    rows = sum(batch["rows"] for batch in record["batches"])
    arrays = {name: _map(target, leaf, rows) for name, leaf in record["leaves"].items()}
    if like is None:
        return arrays[""] if list(arrays) == [""] else arrays
    flat, treedef = jax.tree_util.tree_flatten_with_path(like)
    names = [path_string(key) for key, _ in flat]
    if sorted(names) != sorted(arrays):
        raise CacheError(f"{target} has the arrays {sorted(arrays)}, and like has {sorted(names)}")
    return jax.tree.unflatten(treedef, [arrays[name] for name in names])


def _append(folder: Path, record: dict[str, Any], answers: Any) -> None:
    """Writes a batch, and then the record that it is there."""
    flat = jax.tree_util.tree_leaves_with_path(answers)
    arrays = {path_string(key): np.asarray(leaf) for key, leaf in flat}
    rows = {a.shape[0] if a.ndim else None for a in arrays.values()}
    if len(rows) != 1 or None in rows:
        shapes = {name: a.shape for name, a in arrays.items()}
        raise ValueError(f"a teacher answers with arrays [examples, ...]; got {shapes}")
    leaves: dict[str, Any] = {
        name: {"file": f"{i}.bin", "dtype": a.dtype.name, "shape": list(a.shape[1:])}
        for i, (name, a) in enumerate(arrays.items())
    }
    if not record["leaves"]:
        record["leaves"] = leaves
    elif record["leaves"] != leaves:
        raise ValueError(f"a batch answers with {leaves}, the first with {record['leaves']}")
    checksums = []
    for name, a in arrays.items():
        data = np.ascontiguousarray(a).reshape(-1).view(np.uint8).data if a.size else b""
        with open(folder / leaves[name]["file"], "ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        checksums.append(_digest(data))
    record["batches"].append({"rows": rows.pop(), "checksums": checksums})
    _write(folder, record)


def _resumed(folder: Path, about: Any) -> dict[str, Any]:
    """The record of a cache that was begun; what was written after it is cut off."""
    if not (folder / "record.json").exists():
        record = {"version": _VERSION, "about": about, "leaves": {}, "batches": []}
        _write(folder, record)
        return record
    record = _read(folder)
    _say_the_same(folder, record["about"], about)
    rows = sum(batch["rows"] for batch in record["batches"])
    # A first batch that was cut short has files and is not in the record yet.
    for file in folder.glob("*.bin"):
        known = [leaf for leaf in record["leaves"].values() if leaf["file"] == file.name]
        size = rows * _row_bytes(known[0]) if known else 0
        if file.stat().st_size < size:
            raise CacheError(f"{file} is shorter than its record says; remove {folder}")
        os.truncate(file, size)
    _verify(folder, record)
    return record


def _read(folder: Path) -> dict[str, Any]:
    text = (folder / "record.json").read_text()
    try:
        outer = json.loads(text)
        record, digest = outer["record"], outer["digest"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise CacheError(f"{folder} has no intact record of a cache") from None
    if _digest(json.dumps(record).encode()) != digest:
        raise CacheError(f"the record of {folder} was altered")
    if record["version"] > _VERSION:
        raise CacheError(f"{folder} has version {record['version']}; this library reads {_VERSION}")
    return record


def _write(folder: Path, record: dict[str, Any]) -> None:
    aside = folder / ".record.json"
    with open(aside, "w") as file:
        json.dump({"digest": _digest(json.dumps(record).encode()), "record": record}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, folder / "record.json")


def _verify(folder: Path, record: dict[str, Any]) -> None:
    for i, leaf in enumerate(record["leaves"].values()):
        with open(folder / leaf["file"], "rb") as file:
            for number, batch in enumerate(record["batches"]):
                data = file.read(batch["rows"] * _row_bytes(leaf))
                if _digest(data) != batch["checksums"][i]:
                    raise CacheError(f"{folder}: batch {number} was altered after it was written")
            if file.read(1):
                raise CacheError(f"{folder}: {leaf['file']} is longer than its record says")


def _map(folder: Path, leaf: dict[str, Any], rows: int) -> np.ndarray:
    file, shape = folder / leaf["file"], (rows, *leaf["shape"])
    if file.stat().st_size != rows * _row_bytes(leaf):
        raise CacheError(f"{file} is not as long as its record says")
    if 0 in shape:  # nothing can be mapped of an empty file
        return np.zeros(shape, np.dtype(leaf["dtype"]))
    return np.memmap(file, np.dtype(leaf["dtype"]), "r", shape=shape)


def _row_bytes(leaf: dict[str, Any]) -> int:
    return int(np.prod(leaf["shape"], dtype=np.int64)) * np.dtype(leaf["dtype"]).itemsize


def _say_the_same(folder: Path, there: Any, here: Any) -> None:
    if there != here:
        raise CacheError(f"{folder} is about {there!r}, not about {here!r}; remove it or rename it")


def _digest(data: Any) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _sync(folder: Path) -> None:
    """So that the rename is on the disk too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _tick(progress: Callable[[], None] | None) -> None:
    if progress is not None:
        progress()
