"""Print the lowest versions that pyproject.toml allows, as constraints for pip."""

import itertools
import pathlib
import re
import tomllib

text = (pathlib.Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
project = tomllib.loads(text)["project"]
extras = ("plot", "demo", "huggingface", "cli", "quant", "test")
groups = [project["optional-dependencies"][extra] for extra in extras]
for requirement in itertools.chain(project["dependencies"], *groups):
    if found := re.fullmatch(r"([\w-]+)>=([\w.]+)", requirement):
        print("==".join(found.groups()))
