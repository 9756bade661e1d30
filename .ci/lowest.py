"""Print the lowest versions that pyproject.toml allows, as constraints for pip."""

import itertools
import pathlib
import re
import tomllib

text = (pathlib.Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
project = tomllib.loads(text)["project"]
groups = [project["optional-dependencies"][e] for e in ("plot", "demo", "cli", "quant", "test")]
for requirement in itertools.chain(project["dependencies"], *groups):
    if found := re.fullmatch(r"([\w-]+)>=([\w.]+)", requirement):
        print("==".join(found.groups()))
