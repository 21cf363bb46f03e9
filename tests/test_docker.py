from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_image_installs_every_dependency_before_the_code():
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", "")
    code = re.search(r'python -c "(.+)"', lines)[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *(x for name in sorted(extras) if name != "dev" for x in extras[name]),
    ]
    assert done.stdout.split("\n")[:-1] == wanted
    assert lines.index("--requirement /requirements.txt") < lines.index("COPY --from=build /wheels")
