"""Run mypy over every package, the mapped folders too.

From the root, mypy does not see that export/, runtime/ and calib/ are edgeprune.export and so on,
and reports success over less than half of the files. So the packages are linked into the tree that
an installed edgeprune has, and checked there.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAPPED = ("export", "runtime", "calib")


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "edgeprune"
        package.mkdir()
        for item in (ROOT / "edgeprune").iterdir():
            (package / item.name).symlink_to(item)
        for name in MAPPED:
            (package / name).symlink_to(ROOT / name)
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
        cache = ["--cache-dir", str(ROOT / ".mypy_cache")]
        return subprocess.call([*command, *cache, "-p", "edgeprune"], cwd=folder)


if __name__ == "__main__":
    sys.exit(main())
