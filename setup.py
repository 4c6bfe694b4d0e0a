"""Builds the native CPU kernels with the package, where there is a C++17 compiler.

Everything else about the package is in pyproject.toml. The library is loaded by ctypes and has
no Python in it, so a wheel with it is for a platform but for any Python.
"""

import importlib.util
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

# By the package's name: a source distribution has a folder where the checkout has a link.
NATIVE = Path(__file__).resolve().parent / "jaxcompress" / "kernels" / "cpu"


def native_build():
    """jaxcompress/kernels/cpu/build.py as a module: the package is not importable yet."""
    spec = importlib.util.spec_from_file_location("native_build", NATIVE / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildNative(build_ext):
    """Compiles with build.py; without a compiler the package comes without it."""

    def build_extension(self, ext):
        build = native_build()
        try:
            build.build(Path(self.get_ext_fullpath(ext.name)))
        except build.BuildError as error:
            print(f"jaxcompress: installed without the native CPU kernels: {error}", flush=True)

    def get_ext_filename(self, fullname):
        *folders, _ = super().get_ext_filename(fullname).split("/")
        return "/".join([*folders, native_build().LIBRARY])


class AnyPython(bdist_wheel):
    """A wheel for every Python of this platform; for every platform if nothing was built."""

    def get_tag(self):
        built = next(Path(self.bdist_dir).rglob(native_build().LIBRARY), None)
        return "py3", "none", super().get_tag()[2] if built else "any"


setup(
    ext_modules=[Extension("jaxcompress.kernels.cpu.native", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPython},
)
