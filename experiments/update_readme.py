"""Takes a report into experiments/results and its table into the README.

    python experiments/update_readme.py report

Checks in what the README states: experiments/results/compress_digits.json and .png, and the
table between the markers in README.md, which a test compares with that JSON.
"""

import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from _digits_report import table
from _harness import ROOT, Parser, fail, write_json

RESULTS = ROOT / "experiments" / "results"
BEGIN, END = "<!-- compress_digits:", "<!-- /compress_digits -->"


def block(record: dict) -> str:
    """What stands between the markers: the table, one sentence, the picture."""
    head, rows = table(record["variants"])
    line = lambda cells: "| " + " | ".join(cells) + " |"
    rule = line(["---"] + ["---:"] * (len(head) - 1))
    environment = record["environment"]
    return "\n".join(
        [
            "",
            line(head),
            rule,
            *(line(row) for row in rows),
            "",
            record["summary"]
            + f" `{environment['command']}`, seeds {environment['seeds']}, on "
            + f"{environment['machine']['cores']} cores ({environment['machine']['processor']}); "
            + "paired 95 % intervals over the same 1,000 test digits and seeds.",
            "",
            "![accuracy against bytes](experiments/results/compress_digits.png)",
            "",
        ]
    )


def replaced(readme: str, record: dict) -> str:
    """The README with the block of `record` between its markers."""
    start = readme.index("\n", readme.index(BEGIN)) + 1
    return readme[:start] + block(record) + readme[readme.index(END) :]


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, help="the folder that compress_digits.py wrote")
    report = parser.parse_args().report
    if not (report / "report.json").exists():
        fail(f"{report} has no report.json; run experiments/compress_digits.py first")
    record = json.loads((report / "report.json").read_text())
    write_json(RESULTS / "compress_digits.json", record)
    shutil.copyfile(report / "accuracy_against_bytes.png", RESULTS / "compress_digits.png")
    readme = ROOT / "README.md"
    readme.write_text(replaced(readme.read_text(), record))


if __name__ == "__main__":
    main()
