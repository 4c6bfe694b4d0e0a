"""The suites and what they share lie next to this file."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
