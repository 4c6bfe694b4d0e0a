"""Long experiments go on where they stopped: each run's result is kept as it is done."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _harness import environment, fail, write_json

Once = Callable[[str, Callable[[], Any]], Any]


def resumable(out: Path, settings: Any) -> tuple[Once, Callable[[], None]]:
    """`once(name, run)` and `done()`, for the runs of the report that goes to `out`.

    `once` returns the JSON that `run()` gives, from the disk if a run of that name, of
    these settings and this commit has been there. `done` clears what was kept.
    """
    aside = out.resolve().with_name(f".{out.name}.runs")
    about = json.dumps([settings, environment()["commit"]])
    folder = aside / hashlib.blake2b(about.encode(), digest_size=6).hexdigest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot write to {out.parent}: {error.strerror}")

    def once(name: str, run: Callable[[], Any]) -> Any:
        file = folder / f"{name}.json"
        if not file.exists():
            write_json(file, run())
        return json.loads(file.read_text())

    return once, lambda: shutil.rmtree(aside, ignore_errors=True)
