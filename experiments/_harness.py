"""What every experiment needs: a clean exit, a record of the environment, safe output.

Nothing here knows about models or data.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent


def fail(message: str) -> NoReturn:
    """One line on standard error, and a non-zero exit."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (see --help)")


def need(*packages: str) -> None:
    """Exits with the command that installs what is missing."""
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        fail(
            f"this experiment needs {', '.join(missing)}: "
            "pip install -e '.[experiments]' (or make demo, which does it)"
        )


def environment(seeds: Sequence[int] = ()) -> dict[str, Any]:
    """What somebody needs to repeat a run: command, versions, commit, machine."""
    versions = {}
    for name in ("jax", "jaxlib", "flax", "optax", "quax", "numpy", "jaxcompress"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    script = Path(sys.argv[0])
    name = script.resolve().relative_to(ROOT) if script.resolve().is_relative_to(ROOT) else script
    return {
        "command": " ".join(["python", str(name), *sys.argv[1:]]),
        "seeds": list(seeds),
        "versions": versions | {"python": platform.python_version()},
        "commit": _commit(),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "system": platform.system(),
            **_accelerator(),
        },
    }


def _accelerator() -> dict[str, str]:
    """The GPU or TPU that the program's jax works on, if there is one."""
    jax = sys.modules.get("jax")
    if jax is None or jax.default_backend() == "cpu":
        return {}
    return {"accelerator": jax.devices()[0].device_kind}


def _commit() -> str:
    """The commit, with a plus where files differ from it; "unknown" outside a checkout."""
    git = lambda *args: subprocess.run(
        ["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=True
    ).stdout.strip()
    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_bytes() -> int:
    """Of this program alone, on Linux: `ru_maxrss` of a child begins with its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [peak] = [line.split()[1] for line in lines if line.startswith("VmHWM")]
    return int(peak) * 1024


def write_json(path: Path, record: Any) -> None:
    """Writes aside and renames, so that a reader never sees half a file."""
    text = json.dumps(record, indent=1) + "\n"
    handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    finally:
        Path(aside).unlink(missing_ok=True)


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder to write to; it becomes `out` if the block succeeds, and vanishes if not.

    An older `out` is replaced, but only one that a run of an experiment has made; reports of
    other experiments inside it stay.
    """
    out = out.resolve()
    try:
        if out.exists() and not _replaceable(out):
            fail(
                f"{out} exists and is no report of an experiment; choose another folder with --out"
            )
        out.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        fail(f"cannot write to {out.parent}: {error.strerror}")
    try:
        (aside / OURS).touch()
        yield aside
        aside.chmod(0o755)
        _exchange(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


OURS = ".experiment"  # a file that marks what an experiment has made


def _replaceable(out: Path) -> bool:
    """True of a report, and of a folder that holds nothing but reports."""
    ours = lambda path: (path / OURS).exists()
    return out.is_dir() and (ours(out) or all(map(ours, out.iterdir())))


def _exchange(new: Path, out: Path) -> None:
    """Renames only, so that no moment has half a report; the old one is deleted last."""
    if not out.exists():
        new.replace(out)
        return
    old = out.replace(new.with_name(f"{new.name}.old"))
    new.replace(out)
    for inside in old.iterdir():
        if (inside / OURS).exists():
            inside.replace(out / inside.name)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, int], Callable[[], None]]]:
    """A progress display: `advance = add("training", steps)`, then `advance()` each step."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns) as display:

        def add(description: str, total: int) -> Callable[[], None]:
            task = display.add_task(description, total=total)
            return lambda: display.advance(task)

        yield add


def interleaved(
    runs: dict[str, Callable[[], Any]],
    repeats: int,
    budget: float = 1.0,
    clock: Callable[[], float] = time.perf_counter,
    in_a_row: int = 1,
) -> dict[str, list[float]]:
    """Milliseconds of each run, taken in turns so that a noisy machine is noisy for all.

    Each is run once before, to compile; then `repeats` rounds, or fewer once `budget`
    seconds are spent (five at least). `time.process_time` for a clock counts the time of
    all cores together, to which what else the machine does adds little. With several
    `in_a_row`, a turn is so many runs and one more before them that does not count: it
    wakes this one's threads, and sees out those of the one before, which may still spin.
    """
    import jax

    for run in runs.values():
        jax.block_until_ready(run())
    times: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for i in range(repeats):
        if i >= 5 and time.perf_counter() - start > budget:
            break
        for name, run in runs.items():
            if in_a_row > 1:
                jax.block_until_ready(run())
            for _ in range(in_a_row):
                begin = clock()
                jax.block_until_ready(run())
                times[name].append((clock() - begin) * 1e3)
    return times
