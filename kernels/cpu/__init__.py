"""The native library of the CPU kernels: whether it is here, and which path the CPU takes.

It is built by `pip install` where there is a C++17 compiler (`python -m
jaxcompress.kernels.cpu.build` builds it later), and has no Python in it.
"""

import ctypes
import functools
import os
import threading
from pathlib import Path

import jax

__all__ = ["PATHS", "PATH_VARIABLE", "library", "missing", "path"]

LIBRARY = Path(__file__).parent / "libjaxcompress_cpu.so"
TARGETS = (
    "jaxcompress_int8_matmul",
    "jaxcompress_quantized_matmul",
    "jaxcompress_sparse_matmul",
    "jaxcompress_block_matmul",
    "jaxcompress_quantized_block_matmul",
)

# Best first, as the library tries them. The variable names one instead, for tests.
PATHS = ("avx512vnni", "avx512vnni256", "avxvnni", "avx2", "neondot", "portable")
PATH_VARIABLE = "JAXCOMPRESS_CPU_PATH"

_registering = threading.Lock()


@functools.cache
def missing() -> str | None:
    """Why there is no native library, or None: its functions are known to XLA then."""
    if not LIBRARY.is_file():
        return (
            "the native kernels were not built when jaxcompress was installed "
            "(python -m jaxcompress.kernels.cpu.build builds them; it needs a C++17 compiler)"
        )
    try:
        library()
    except OSError as error:
        return f"the native kernels do not load: {error}"
    except AttributeError as error:  # a function that this version has, and the library has not
        return (
            f"the native kernels are those of another version of jaxcompress ({error}); python -m "
            "jaxcompress.kernels.cpu.build builds them again"
        )
    return None


def library() -> ctypes.CDLL:
    """The library, loaded and its functions registered, once."""
    with _registering:
        return _library()


@functools.cache
def _library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(LIBRARY))
    for name in TARGETS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(loaded, name)), platform="cpu")
    loaded.jaxcompress_path.restype = ctypes.c_char_p
    loaded.jaxcompress_path.argtypes = [ctypes.c_char_p]
    return loaded


def path() -> str:
    """The path that products take: the best that the CPU has, or the one that is asked for.

    Raises `ValueError` if the variable names none, or one that the CPU lacks.
    """
    name = os.environ.get(PATH_VARIABLE, "")
    found = library().jaxcompress_path(name.encode()).decode()
    if not found:
        have = [p for p in PATHS if library().jaxcompress_path(p.encode())]
        raise ValueError(f"{PATH_VARIABLE}={name!r}: this CPU has the paths {', '.join(have)}")
    return found
