"""Breaks the library in ten ways, one for each of its invariants, and sees the tests fail.

python tests/mutations/run.py [NUMBER ...]: each patch here is applied to a copy of the
repository, and the tests that its header names have to fail there; unpatched they have to
pass. Exits with 1 if a mutant survives or a patch no longer applies.
"""

import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
AT_A_TIME = 2


class Mutant(NamedTuple):
    """A patch, what it breaks, and the tests that notice."""

    patch: Path
    invariant: str
    tests: list[str]


def read(patch: Path) -> Mutant:
    """The header of a patch: the lines before the diff, `name: text`."""
    head = patch.read_text().split("diff --git")[0]
    fields = dict(line.split(": ", 1) for line in head.splitlines() if ": " in line)
    return Mutant(patch, fields["invariant"], fields["tests"].split())


def copy(to: Path) -> Path:
    """The tracked files as they are now, the link to the kernels included."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        source, target = ROOT / name, to / name
        if source.is_symlink() or source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    return to


def pytest(folder: Path, *args: str) -> tuple[int, str]:
    """Its exit code and output, with the library of `folder` and no other."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=line", *args],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def verdict(mutant: Mutant, work: Path) -> str | None:
    """None if the tests notice; else what went wrong."""
    folder = copy(work / mutant.patch.stem)
    applied = subprocess.run(
        ["git", "apply", str(mutant.patch)], cwd=folder, capture_output=True, text=True
    )
    if applied.returncode:
        return f"the patch does not apply: {applied.stderr.strip()}"
    code, output = pytest(folder, *mutant.tests)
    if code == 0:
        return "it survives: the tests pass"
    if code != 1 or not re.search(r"\d+ failed", output):
        return f"the tests did not run (exit code {code}):\n{output}"
    return None


def main() -> int:
    wanted = {number.zfill(2) for number in sys.argv[1:]}
    by_number = {p.name.split("_")[0]: read(p) for p in sorted(HERE.glob("*.patch"))}
    if not wanted <= set(by_number):
        # Without a mutant there would be no test to name, and pytest would run them all.
        sys.exit(f"mutants have the numbers {', '.join(by_number)}; got {', '.join(sys.argv[1:])}")
    mutants = [m for number, m in by_number.items() if not wanted or number in wanted]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        tests = dict.fromkeys(test for mutant in mutants for test in mutant.tests)
        code, output = pytest(copy(work / "unpatched"), *tests, "-n", str(AT_A_TIME))
        if code:
            print(f"the tests fail without any patch:\n{output}")
            return 1
        print(f"unpatched: {output.strip().splitlines()[-1]}", flush=True)
        survived = 0
        with concurrent.futures.ThreadPoolExecutor(AT_A_TIME) as pool:
            for mutant, wrong in zip(mutants, pool.map(lambda m: verdict(m, work), mutants)):
                survived += wrong is not None
                print(f"{mutant.invariant}: {wrong or 'noticed'}", flush=True)
    print(f"{len(mutants) - survived} of {len(mutants)} mutants noticed", end=" ")
    print(f"in {time.monotonic() - begin:.0f} s")
    return int(survived > 0 or not mutants)


if __name__ == "__main__":
    sys.exit(main())
