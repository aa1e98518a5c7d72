"""Run mypy over every package, the mapped folders too.

From the root, mypy does not see that export/, runtime/ and calib/ are edgeprune.export and so on,
and reports success over less than half of the files. So the packages are linked into the tree that
an installed edgeprune has, and checked there. What runs on a device is checked as on Windows too,
where a module or a name that only other systems have is an error. Of tests and benchmarks one thing
is asked: that each module and each attribute they name is there. Many of them run seldom.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from mypy.errorcodes import error_codes

ROOT = Path(__file__).resolve().parents[1]
CHECKED = {
    "linux": ("edgeprune",),
    "win32": tuple(
        f"edgeprune.{name}"
        for name in ("runtime", "bench", "drawing", "report", "serve", "watch", "demo")
    ),
}
"""By platform, the packages that are checked for it, with all that they import."""
MAPPED = ("export", "runtime", "calib")
SELDOM = ("tests", "benchmarks")
ASKED = ("attr-defined", "import", "import-not-found", "syntax")
"""Codes of the errors that are looked for there."""


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "edgeprune"
        package.mkdir()
        for item in (ROOT / "edgeprune").iterdir():
            (package / item.name).symlink_to(item)
        for name in MAPPED:
            (package / name).symlink_to(ROOT / name)
        for name in SELDOM:
            (Path(folder) / name).symlink_to(ROOT / name)
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
        for platform, packages in CHECKED.items():
            own = ["--platform", platform, "--cache-dir", str(ROOT / ".mypy_cache" / platform)]
            named = [argument for package in packages for argument in ("-p", package)]
            if code := subprocess.call([*command, *own, *named], cwd=folder):
                return code
        others = [f"--disable-error-code={code}" for code in error_codes if code not in ASKED]
        named = [argument for name in SELDOM for argument in ("-p", name)]
        own = ["--implicit-reexport", "--cache-dir", str(ROOT / ".mypy_cache" / "seldom")]
        return subprocess.call([*command, *own, *others, *named], cwd=folder)


if __name__ == "__main__":
    sys.exit(main())
