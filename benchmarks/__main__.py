"""Run all benchmarks in sequence, or those that are named, or only render their pages again.

    python -m benchmarks [--render] [NAME ...]

Each benchmark runs in a separate process, as ``python -m benchmarks.NAME``. All of them take about
three hours on two cores. ``--render`` measures nothing: it writes the pages and pictures from the
JSON files.
"""

import argparse
import importlib
import subprocess
import sys

from benchmarks import results


def names() -> list[str]:
    """Return the names of the benchmarks: the files in this folder that have a main function."""
    found = sorted(path for path in results.HERE.glob("*.py") if path.name != "__main__.py")
    return [path.stem for path in found if 'if __name__ == "__main__"' in path.read_text("utf-8")]


def render(name: str) -> None:
    """Render the results of a benchmark, also those of other backends (``NAME-gpu.json``)."""
    module = importlib.import_module(f"benchmarks.{name}")
    for path in results.HERE.glob(f"{name}*.json"):
        results.render(path, module.text, getattr(module, "picture", None))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("name", nargs="*", help=f"benchmark to run: {', '.join(names())}")
    parser.add_argument(
        "--render", action="store_true", help="write pages and pictures from the JSON files"
    )
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.name) - set(names()):
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}")
    failed = []
    for name in chosen.name or names():
        if chosen.render:
            render(name)
            continue
        print(f"\n== {name}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
