"""Compiles the native kernels: one command, a C++17 compiler, no dependency but jaxlib's headers.

    python kernels/cpu/build.py            # libjaxcompress_cpu.so beside this file
    python kernels/cpu/build.py --test X   # the native test as the program X
    python kernels/cpu/build.py --test X --sanitize

`pip install` does the first by itself. The library has no Python in it: one file serves every
Python version, and each part of it that wants particular instructions runs only where the CPU
has them. CXX names the compiler, CXXFLAGS adds options.
"""

import argparse
import concurrent.futures
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARY = "libjaxcompress_cpu.so"
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-pthread",
    # Products and sums round apart, so that every path gives the same floats.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
)
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni")
# Sums of products of floats, which no two of these give to the same bit.
_FUSED = ("-ffp-contract=fast",)
_PORTABLE: dict[str, tuple[str, ...]] = {
    "ffi.cc": (),
    "matmul.cc": (),
    "sparse.cc": (),
    "blocks.cc": (),
    "block_codes.cc": (),
    "paths.cc": (),
    "path_portable.cc": (),
    "sparse_portable.cc": _FUSED,
}
_X86: dict[str, tuple[str, ...]] = {
    "path_avx512vnni.cc": (*_AVX512, "-mprefer-vector-width=512"),
    "path_avx512vnni256.cc": _AVX512,
    "path_avxvnni.cc": ("-mavx2",),
    "path_avx2.cc": ("-mavx2",),
    "sparse_avx512.cc": (*_AVX512, *_FUSED),
    "sparse_avx2.cc": ("-mavx2", "-mfma", *_FUSED),
}


_ARM: dict[str, tuple[str, ...]] = {"path_neondot.cc": ("-march=armv8.2-a+dotprod",)}


class BuildError(RuntimeError):
    """The library cannot be built here; the message is one line that says why."""


def sources(machine: str) -> dict[str, tuple[str, ...]]:
    """The files that make the library on a machine, with the flags of each."""
    machine, more = machine.lower(), {}
    if machine in ("x86_64", "amd64"):
        more = _X86
    elif machine in ("aarch64", "arm64"):
        more = _ARM
    return {**_PORTABLE, **more}


def compiler() -> list[str]:
    """The command of the C++ compiler."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise BuildError("no C++ compiler was found (c++, g++, clang++, or what CXX names)")


def include_dir() -> Path:
    """The headers of XLA's foreign functions, without importing JAX."""
    spec = importlib.util.find_spec("jaxlib")
    for folder in (spec and spec.submodule_search_locations) or ():
        if Path(folder, "include/xla/ffi/api/ffi.h").is_file():
            return Path(folder, "include")
    raise BuildError("jaxlib, whose headers are needed, is not installed")


def build(
    target: Path,
    *,
    test: bool = False,
    sanitize: bool = False,
    machine: str | None = None,
) -> None:
    """Compiles the library, or the native test, to `target`; raises `BuildError`."""
    command = [*compiler(), *FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    files = sources(machine or platform.machine())
    if sanitize:
        command += ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    if test:
        del files["ffi.cc"]
        files["native_test.cc"] = ()
    else:
        command += ["-isystem", str(include_dir())]
    with tempfile.TemporaryDirectory() as folder:
        objects = [str(Path(folder, name).with_suffix(".o")) for name in files]
        jobs = [
            [*command, *flags, "-c", str(HERE / name), "-o", out]
            for (name, flags), out in zip(files.items(), objects)
        ]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, jobs))
        # Linked aside and renamed: a process that has the old one open keeps it.
        linked = Path(folder, target.name)
        _run([*command, *([] if test else ["-shared"]), *objects, "-o", str(linked)])
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copy(linked, aside)
        os.replace(aside, target)


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error.strerror}") from error
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise BuildError(f"{command[0]} failed")
    sys.stderr.write(done.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / LIBRARY, help="where the library goes")
    parser.add_argument("--test", type=Path, help="build the native test instead, as this program")
    parser.add_argument("--sanitize", action="store_true", help="address and undefined behaviour")
    parser.add_argument("--machine", help="as platform.machine() names it, to cross-compile")
    args = parser.parse_args()
    try:
        build(
            args.test or args.out,
            test=args.test is not None,
            sanitize=args.sanitize,
            machine=args.machine,
        )
    except BuildError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
