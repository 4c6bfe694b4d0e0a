"""A damaged file gives `LoadError`, or the arrays that were saved; never others."""

import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxcompress as jc
from jaxcompress.io import _save


def tree():
    params = {"w": jnp.arange(60.0).reshape(20, 3) - 25, "b": [jnp.ones(5, jnp.bfloat16)]}
    return jc.quantize.quantize(params, {"w": jc.quantize.int4(group_size=10)})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("damage") / "model.safetensors"
    jc.io.save(path, tree())
    return path.read_bytes()


def fingerprint(params):
    leaves = [(np.asarray(x).tobytes(), x.dtype.name, x.shape) for x in jax.tree.leaves(params)]
    return jax.tree.structure(params), leaves


def header_size(data):
    return 8 + struct.unpack("<Q", data[:8])[0]


@pytest.fixture
def survives(tmp_path):
    """Whether damaged bytes load; then they must load to what was saved."""
    path, want = tmp_path / "damaged.safetensors", fingerprint(tree())

    def attempt(data):
        path.write_bytes(data)
        try:
            got = jc.io.load(path)
        except jc.io.LoadError:
            return False
        assert fingerprint(got) == want
        return True

    return attempt


def flipped(data, position, bits):
    return data[:position] + bytes([data[position] ^ bits]) + data[position + 1 :]


def test_the_whole_file_loads(saved, survives):
    assert survives(saved)


@pytest.mark.parametrize("bits", [0xFF, 0x01, 0x02, 0x20])
def test_every_byte_of_the_header(saved, survives, bits):
    loaded = [p for p in range(header_size(saved)) if survives(flipped(saved, p, bits))]
    # Only the blanks that fill the header up can change into other blanks.
    assert all(saved[p : p + 1] == b" " for p in loaded)


def test_a_thousand_bytes_of_the_payload(saved, survives):
    random = np.random.default_rng(0)
    begin = header_size(saved)
    for position in random.integers(begin, len(saved), 1000):
        assert not survives(flipped(saved, int(position), int(random.integers(1, 256))))


def test_truncated_anywhere(saved, survives):
    for size in {*range(0, len(saved), 64), *range(0, 32), len(saved) - 1}:
        assert not survives(saved[:size])


def test_longer_than_it_was(saved, survives):
    assert not survives(saved + b"\0")
    assert not survives(saved + saved)


def test_tensors_that_changed_places(saved, survives):
    """Two tensors of one type and size, swapped in the header: names are part of the record."""
    size = header_size(saved)
    header = json.loads(saved[8:size])
    names = [n for n in header if n != "__metadata__"]
    for a in names:
        for b in names:
            if a < b:
                changed = dict(header)
                changed[a], changed[b] = header[b], header[a]
                text = json.dumps(changed).encode()
                assert not survives(struct.pack("<Q", len(text)) + text + saved[size:])


def rewritten(path, change):
    """The file with another record, its digest made to fit."""
    size = header_size(path.read_bytes())
    header = json.loads(path.read_bytes()[8:size])
    record = json.loads(header["__metadata__"]["jaxcompress"])
    change(record)
    text = json.dumps(record)
    metadata = {"jaxcompress": text, "digest": _save._digest(text.encode())}
    header["__metadata__"] = metadata
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + path.read_bytes()[size:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(version=2), "version 2 of the format.*upgrade jaxcompress"),
        (lambda r: r["leaves"]["w"].update({"class": "NewArray"}), "'w' is of a kind.*NewArray"),
        (lambda r: r["leaves"]["w"].update(zeros=1), "'w' is of a kind that this library"),
        (lambda r: r["leaves"]["w"]["qtype"].update(Other=1), "'w' is of a kind"),
    ],
)
def test_newer_files(tmp_path, change, message):
    path = tmp_path / "model.safetensors"
    jc.io.save(path, tree())
    rewritten(path, change)
    with pytest.raises(jc.io.LoadError, match=message):
        jc.io.load(path)


def test_files_of_others(tmp_path):
    save_file({"a": np.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(jc.io.LoadError, match="no jaxcompress record"):
        jc.io.load(tmp_path / "other.safetensors")
    (tmp_path / "pickle").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(jc.io.LoadError, match="no intact safetensors file"):
        jc.io.load(tmp_path / "pickle")
    with pytest.raises(FileNotFoundError):
        jc.io.load(tmp_path / "nothing")
    with pytest.raises(IsADirectoryError):
        jc.io.load(tmp_path)


def test_float64_is_not_halved_in_silence(tmp_path):
    jc.io.save(tmp_path / "file", {"a": np.ones(3)})
    with pytest.raises(jc.io.LoadError, match="'a' is float64; enable jax_enable_x64"):
        jc.io.load(tmp_path / "file")


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    jc.io.save(path, {"a": jnp.ones(3)})
    before = path.read_bytes()

    def full(tensors, target, metadata):
        with open(target, "wb") as file:
            file.write(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(_save, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        jc.io.save(path, {"a": jnp.zeros(3)})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_new_file_can_be_read_by_whom_the_umask_allows(tmp_path):
    jc.io.save(tmp_path / "model", {"a": jnp.ones(1)})
    (tmp_path / "other").touch()
    modes = [(tmp_path / name).stat().st_mode for name in ("model", "other")]
    assert modes[0] == modes[1]


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"a": {"f": jax.nn.relu}}, TypeError, "'a/f' is no plain array.*eqx.filter"),
        ({"a": 1.0}, TypeError, "'a' is no plain array but float"),
        ({"k": jax.random.key(0)}, TypeError, "'k' is no plain array"),
        ({"a": jnp.ones(2, jnp.float8_e3m4)}, TypeError, "'a' is float8_e3m4"),
        (
            {"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}},
            ValueError,
            "two leaves have the path 'a/b'",
        ),
        ({"__metadata__": jnp.ones(1)}, ValueError, "__metadata__"),
    ],
)
def test_what_cannot_be_saved(tmp_path, params, error, message):
    with pytest.raises(error, match=message):
        jc.io.save(tmp_path / "file", params)
    assert not list(tmp_path.iterdir())
