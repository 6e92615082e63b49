"""Start the local OpenAI-compatible server from a checkout; see `--help`."""

from __future__ import annotations

import sys
from pathlib import Path

try:
    from stillhouse.teachers.openai_server import main
except ModuleNotFoundError as error:
    if error.name != "stillhouse":
        raise
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
    from stillhouse.teachers.openai_server import main

if __name__ == "__main__":
    sys.exit(main())
