"""Entropy-coded files: the tensors of a checkpoint in about as many bytes as they have news.

A file is `jaxcoded`, a digest of all that follows, the size of the head, the head (JSON,
deflated) and the bodies of the tensors, one after another. Each body is a tensor's bytes in a
form whose symbols are worth counting, then coded:

- "bytes": as they lie in memory.
- "apart": the first bytes of all elements, then the second ones, ...: exponents of floats.
- "codes": a byte for each code of bit planes, so that frequent codes are found.
- "gaps": of bits, how many zeros come before each one (Han et al., 2016); 255 stands for as
  many zeros and no one.

"huffman" is zlib's Huffman code without its search for repetitions: of gaps and codes within a
few percent of their entropy. "lzma" is for what repeats. The shortest is taken.
"""

import hashlib
import json
import lzma
import struct
import zlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays._packing import pack, unpack

__all__ = ["MAGIC", "CodedError", "encode", "read_head", "read_tensors"]

MAGIC = b"jaxcoded"  # as the first eight bytes of safetensors, a header larger than any file
_DIGEST = 16
_LZMA: list[dict[str, Any]] = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 0, "pb": 0}]


class CodedError(ValueError):
    """The bytes are not those that `encode` made."""


def encode(
    record: dict[str, Any], tensors: dict[str, np.ndarray], planes: dict[str, tuple[int, int]]
) -> bytes:
    """One file of `tensors`; `planes` names those that are bit planes, with bits and axis."""
    entries, bodies = [], []
    for name, tensor in tensors.items():
        form, coder, body = _shortest(tensor, planes.get(name))
        entries.append([name, tensor.dtype.name, list(tensor.shape), form, coder, len(body)])
        bodies.append(body)
    head = zlib.compress(json.dumps([record, entries], separators=(",", ":")).encode(), 9)
    rest = b"".join([struct.pack("<I", len(head)), head, *bodies])
    return MAGIC + _digest(rest) + rest


def read_head(data: bytes) -> tuple[dict[str, Any], list[Any], int]:
    """The record, an entry for each tensor, and where their bodies begin.

    Raises `CodedError` if a byte of the file was altered or is missing.
    """
    begin = len(MAGIC) + _DIGEST
    if not data.startswith(MAGIC) or _digest(data[begin:]) != data[len(MAGIC) : begin]:
        raise CodedError("it was truncated, or altered after it was saved")
    [size] = struct.unpack_from("<I", data, begin)
    at = begin + 4 + size
    record, entries = json.loads(zlib.decompress(data[begin + 4 : at]))
    return record, entries, at


def read_tensors(data: bytes, entries: list[Any], at: int) -> dict[str, np.ndarray]:
    """The tensors of the entries, whose bodies lie from `at` on."""
    tensors = {}
    for name, dtype, shape, form, coder, size in entries:
        body = _DECODERS[coder](data[at : at + size])
        tensors[name] = _undo(form, body, jnp.dtype(dtype), shape)
        at += size
    return tensors


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()


def _shortest(tensor: np.ndarray, planes: tuple[int, int] | None) -> tuple[list, str, bytes]:
    raw = tensor.reshape(-1).view(np.uint8)
    forms: list[tuple[list, np.ndarray]] = [(["bytes"], raw)]
    if tensor.itemsize > 1:
        forms.append((["apart"], np.ascontiguousarray(raw.reshape(-1, tensor.itemsize).T)))
    bits, axis = planes or (8, -1)
    # Of more ones than that, bytes of eight neighbours are as short, and gaps take memory.
    if bits == 1 and int(np.bitwise_count(raw).sum(dtype=np.int64)) < 0.3 * 8 * raw.size:
        forms.append((["gaps"], _gaps(raw)))
    if 1 < bits < 8:
        size = tensor.shape[axis] * 8 // bits
        codes = np.asarray(unpack(jnp.asarray(tensor), bits, size, axis)).view(np.uint8)
        forms.append((["codes", bits, axis], codes & (2**bits - 1)))
    coded = [(form, "huffman", _huffman(x.tobytes())) for form, x in forms]
    best = min(range(len(forms)), key=lambda i: len(coded[i][2]))
    form, symbols = forms[best]
    repeated = lzma.compress(symbols.tobytes(), lzma.FORMAT_RAW, filters=_LZMA)
    candidates = [coded[best], (form, "lzma", repeated), (["bytes"], "stored", raw.tobytes())]
    return min(candidates, key=lambda candidate: len(candidate[2]))


def _undo(form: list, data: bytes, dtype: np.dtype, shape: list[int]) -> np.ndarray:
    kind, *how = form
    symbols = np.frombuffer(data, np.uint8)
    if kind == "apart":
        symbols = np.ascontiguousarray(symbols.reshape(dtype.itemsize, -1).T)
    elif kind == "gaps":
        symbols = _bits(symbols, int(np.prod(shape)))
    elif kind == "codes":
        bits, axis = how
        unpacked = list(shape)
        unpacked[axis] = shape[axis] * 8 // bits
        symbols = np.asarray(pack(jnp.asarray(symbols.reshape(unpacked)), bits, axis))
    return symbols.reshape(-1).view(dtype).reshape(shape)


def _gaps(data: np.ndarray) -> np.ndarray:
    """Zeros before each one among the bits of `data`, those after the last left out."""
    ones = np.flatnonzero(np.unpackbits(data, bitorder="little"))
    zeros = np.diff(ones, prepend=-1) - 1
    long = zeros // 255
    out = np.full(len(zeros) + int(long.sum()), 255, np.uint8)
    out[np.cumsum(long + 1) - 1] = zeros % 255
    return out


def _bits(gaps: np.ndarray, size: int) -> np.ndarray:
    """The `size` bytes whose gaps these are."""
    one = gaps != 255
    after = np.cumsum(gaps.astype(np.int64) + one)
    bits = np.zeros(8 * size, np.uint8)
    bits[after[one] - 1] = 1
    return np.packbits(bits, bitorder="little")


def _huffman(data: bytes) -> bytes:
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(data) + coder.flush()


_DECODERS: dict[str, Callable[[bytes], bytes]] = {
    "huffman": lambda data: zlib.decompress(data, -15),
    "lzma": lambda data: lzma.decompress(data, lzma.FORMAT_RAW, filters=_LZMA),
    "stored": lambda data: data,
}
