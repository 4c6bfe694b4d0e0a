"""Imports point one way, and what only some users have is imported only where it is used."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A file may import from its own layer and from those before it.
LAYERS = [
    ["_quax", "_max_dtype", "_histogram", "_statistics", "_ranges", "arrays", "_paths", "_rules"],
    ["ops", "io"],
    ["_accelerate", "_layout", "_calibrate", "_prepack", "statistics"],
    ["_program", "_model", "_primitives", "_neighbours", "_matrices", "_sequential", "_compensate"],
    ["quantize", "prune", "distill"],
]
LEVEL = {name: i for i, layer in enumerate(LAYERS) for name in layer}
RUN_TIME = {"equinox", "jax", "jaxlib", "numpy", "optax", "quax", "safetensors"}


def imports(path):
    """`(module, whether it is inside a function)` of every import in a file."""
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from ((name, id(node) in inside) for name in names)


def sources(folder):
    return sorted(p for p in (ROOT / folder).rglob("*.py") if "kernels" not in p.parts[:-2])


@pytest.mark.parametrize("path", sources("jaxcompress"), ids=lambda p: str(p.relative_to(ROOT)))
def test_library_imports_point_down(path):
    parts = path.relative_to(ROOT / "jaxcompress").with_suffix("").parts
    here = LEVEL.get(parts[0], len(LAYERS))
    for name, is_lazy in imports(path):
        top, _, rest = name.partition(".")
        if top == "jaxcompress":
            layer = rest.split(".")[0]
            if layer == "kernels":
                assert is_lazy, f"{name} is imported when the library is"
                assert parts[0] == "ops", f"{name}: only ops call kernels"
            elif parts != ("__init__",):
                assert LEVEL[layer] <= here, f"{name} is above {parts[0]}"
        elif top not in RUN_TIME:
            assert top in __import__("sys").stdlib_module_names, f"{name} is no dependency"


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda p: p.stem)
def test_kernels_know_arrays_only(path):
    allowed = {"jax", "jax_triton", "triton", "numpy"}
    for name, _ in imports(path):
        top = name.split(".")[0]
        known = top in allowed | __import__("sys").stdlib_module_names
        assert known or name.startswith("jaxcompress.kernels."), name


def test_files_are_short():
    for folder in ("jaxcompress", "kernels", "experiments"):
        for path in (ROOT / folder).rglob("*.py"):
            lines = len(path.read_text().splitlines())
            assert lines <= 450, f"{path.relative_to(ROOT)} has {lines} lines"


def test_every_package_ships():
    """Packages are listed in pyproject.toml, because the kernels come through a link."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    top = ROOT / "jaxcompress"
    folders = {p.parent for p in (*top.rglob("*.py"), *(top / "kernels").rglob("*.py"))}
    there = {".".join(p.relative_to(ROOT).parts) for p in folders}
    assert set(listed) == there
