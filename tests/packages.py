"""Builds the wheel and the sdist, installs each, and the checkout editably, and uses them.

python tests/packages.py: every install is a fresh environment that borrows its
dependencies from the one that runs this. The sdist is also installed as if there were no
compiler.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
USE = """
import importlib.resources, jax.numpy as jnp, jaxcompress as jc
from jaxcompress.kernels.int8_matmul import xla
assert jc.ops.int8_matmul.__module__.startswith("jaxcompress."), jc
x = jnp.full((16, 8), 3, jnp.int8)
assert int(jc.ops.int8_matmul(x, x.T, implementation="xla")[0, 0]) == 72
from jaxcompress.kernels import cpu
assert bool(cpu.missing()) == WITHOUT_NATIVE, cpu.missing()
if not cpu.missing():
    assert int(jc.ops.int8_matmul(x, x.T, implementation="cpu")[0, 0]) == 72
assert importlib.resources.files("jaxcompress").joinpath("py.typed").is_file()
assert importlib.resources.files("jaxcompress.kernels").joinpath("blocks.json").is_file()
print(jc.__version__, jc.__file__)
"""


def run(*command: object, cwd: Path | None = None, **environment: str) -> str:
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def environment(folder: Path) -> Path:
    """A fresh environment's Python; it sees this one's packages, jaxcompress apart."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    # The one that Python brings is older than pyproject.toml asks for; see the borrowed one.
    run(python, "-m", "pip", "uninstall", "-q", "-y", "setuptools")
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    # A plain path, so that the .pth of an editable install over there is not read.
    Path(site, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
        run(*build, "-w", work / "wheel", ROOT)
        # What a source distribution holds has to be enough to build the wheel again.
        backend = "import setuptools.build_meta as b; print(b.build_sdist(r'{}'))"
        (work / "sdist").mkdir()
        run(sys.executable, "-c", backend.format(work / "sdist"), cwd=ROOT)
        [wheel], [sdist] = (work / "wheel").glob("*.whl"), (work / "sdist").glob("*.tar.gz")
        compilers = (os.environ.get("CXX"), "c++", "g++", "clang++")
        has_compiler = any(name and shutil.which(name) for name in compilers)
        assert wheel.name.endswith("-none-any.whl") != has_compiler, wheel.name
        legs = (
            ("wheel", [wheel], has_compiler, {}),
            ("sdist", [sdist], has_compiler, {}),
            ("plain", [sdist], False, {"CXX": "no-such-compiler"}),
            ("editable", ["-e", ROOT], has_compiler, {}),
        )
        for name, source, native, settings in legs:
            python = environment(work / f"env-{name}")
            pip = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
            run(*pip, *source, **settings)
            print(f"{name:9}", run(python, "-c", f"WITHOUT_NATIVE = {not native}{USE}", cwd=work))


if __name__ == "__main__":
    main()
