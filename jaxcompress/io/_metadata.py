"""How containers and their static fields are written down: as JSON, and no other way."""

import dataclasses
from typing import Any

import numpy as np

from jaxcompress.arrays import (
    Activation,
    BitmapSparseArray,
    BlockSparseArray,
    CodebookArray,
    CodebookType,
    CompressedArray,
    FakeQuantArray,
    FloatType,
    IntType,
    LowRankArray,
    NMSparseArray,
    OddType,
    PrunedInputArray,
    QuantizedArray,
    RotatedArray,
    ScaledArray,
    TernaryType,
)
from jaxcompress.arrays._activation_sparsity import ActivationSparsity

__all__ = ["CONTAINERS", "array_fields", "bit_planes", "describe", "rebuild"]

CONTAINERS = {
    c.__name__: c
    for c in (
        QuantizedArray,
        FakeQuantArray,
        BitmapSparseArray,
        NMSparseArray,
        BlockSparseArray,
        LowRankArray,
        CodebookArray,
        ScaledArray,
        RotatedArray,
        PrunedInputArray,
    )
}
_VALUES = {
    c.__name__: c
    for c in (IntType, OddType, TernaryType, FloatType, CodebookType, Activation)
    + (ActivationSparsity,)
}


def describe(array: CompressedArray) -> dict[str, Any]:
    """The class of a container and its static fields, those with a default value left out."""
    static = {
        f.name: _encode(getattr(array, f.name))
        for f in dataclasses.fields(array)
        if f.metadata.get("static") and getattr(array, f.name) != f.default and f.name != "path"
    }
    inner = {
        f.name: {**describe(part), "path": part.path}
        for f in dataclasses.fields(array)
        if isinstance(part := getattr(array, f.name), CompressedArray)
    }
    return {"class": type(array).__name__, **static, **inner}


def array_fields(array: CompressedArray) -> dict[str, Any]:
    """The fields of a container that hold arrays, those that are None left out.

    The fields of a container inside it have its name before theirs, `array.values`.
    """
    found: dict[str, Any] = {}
    for f in dataclasses.fields(array):
        value = getattr(array, f.name)
        if isinstance(value, CompressedArray):
            found |= {f"{f.name}.{k}": part for k, part in array_fields(value).items()}
        elif value is not None and not f.metadata.get("static"):
            found[f.name] = value
    return found


def bit_planes(array: CompressedArray) -> dict[str, tuple[int, int]]:
    """Bits and axis of the fields that are bit planes, named as in `array_fields`."""
    found = array.planes()
    for f in dataclasses.fields(array):
        part = getattr(array, f.name)
        if isinstance(part, CompressedArray):
            found |= {f"{f.name}.{k}": how for k, how in bit_planes(part).items()}
    return found


def rebuild(description: dict[str, Any], arrays: dict[str, Any], path: str) -> CompressedArray:
    """The container that `describe` described; any mismatch is a `KeyError` or `TypeError`."""
    cls = CONTAINERS[description["class"]]
    fields: dict[str, Any] = {k: v for k, v in arrays.items() if "." not in k}
    for name, value in description.items():
        if isinstance(value, dict) and "class" in value:
            inner = {k: v for k, v in value.items() if k != "path"}
            parts = {
                k.removeprefix(name + "."): v for k, v in arrays.items() if k.startswith(name + ".")
            }
            fields[name] = rebuild(inner, parts, value["path"])
        elif name != "class":
            fields[name] = _decode(value)
    return cls(**fields, path=path)


def _encode(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, np.dtype):
        return {"dtype": value.name}
    if type(value).__name__ in _VALUES:
        fields = {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {type(value).__name__: fields}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a static field of type {type(value).__name__} cannot be saved")


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, dict):
        [(name, inner)] = value.items()
        if name == "dtype":
            return np.dtype(inner)
        return _VALUES[name](**{k: _decode(v) for k, v in inner.items()})
    return value
