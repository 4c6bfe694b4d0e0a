"""The checked-in tables of what compilers made of the kernels, and the report of a check."""

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


class Report:
    """Collects checks; `finish` compares facts with the table and exits with the verdict.

    A check is an op, a backend, a target and a case; one without facts stands for itself.
    Ops named on the command line are the only ones that are looked at (`wants`).
    The last line says how many there were, for `run.py` to add up.
    """

    def __init__(self, table, versions):
        self.path = HERE / table
        self.versions = versions
        self.facts, self.failures, self.count = {}, [], 0

    def wants(self, op):
        named = [name for name in sys.argv[1:] if not name.startswith("-")]
        return not named or op in named

    def check(self, op, backend, target, case, facts=None, wrong=None):
        self.count += 1
        name = f"{op} {backend} {target}: {case}"
        if facts is not None:
            self.facts[name] = facts
        if wrong:
            self.failures.append(f"{name}: {wrong}")
        print(f"{name:72} {wrong or facts or 'ok'}", flush=True)

    def finish(self):
        table = json.loads(self.path.read_text())
        others = {n: f for n, f in table["kernels"].items() if not self.wants(n.split()[0])}
        if "--write" in sys.argv:
            lines = ",\n".join(
                f"    {json.dumps(name)}: {json.dumps(facts)}"
                for name, facts in sorted({**others, **self.facts}.items())
            )
            versions = json.dumps(self.versions)
            self.path.write_text(
                f'{{\n  "versions": {versions},\n  "kernels": {{\n{lines}\n  }}\n}}\n'
            )
        table = json.loads(self.path.read_text())
        if table["versions"] != self.versions:
            self.failures.append(f"the table is of {table['versions']}, not {self.versions}")
        for name in sorted({*table["kernels"], *self.facts} - {*others}):
            known, now = table["kernels"].get(name), self.facts.get(name)
            if known != now:
                self.failures.append(f"{name}: {now}, where {self.path.name} has {known}")
        print(*self.failures, sep="\n", end="\n" if self.failures else "")
        print(f"{self.count} checks, {len(self.failures)} failures")
        sys.exit(bool(self.failures))
