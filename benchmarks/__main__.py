"""Run all benchmarks, or the named ones, in sequence.

    python benchmarks [NAME ...]

Each runs in a separate process, as ``python benchmarks/NAME.py``. All of them take over an hour on
two cores.
"""

import argparse
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent


def names() -> list[str]:
    """Return the names of the benchmark scripts in this folder: the files that have a main."""
    found = sorted(path for path in HERE.glob("*.py") if path.name != "__main__.py")
    return [path.stem for path in found if 'if __name__ == "__main__"' in path.read_text("utf-8")]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python benchmarks", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("name", nargs="*", help=", ".join(names()))
    chosen = parser.parse_args(arguments).name
    if unknown := set(chosen) - set(names()):
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}")
    failed = []
    for name in chosen or names():
        print(f"\n== {name}", flush=True)
        if subprocess.run([sys.executable, HERE / f"{name}.py"], check=False).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
