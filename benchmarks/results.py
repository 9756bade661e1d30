"""Result files of the benchmarks: numbers as JSON, and the page and the picture made from them."""

from __future__ import annotations

import json
import os
import pathlib
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import jax

HERE = pathlib.Path(__file__).parent
Results = dict[str, Any]  # the contents of a JSON file
Text = Callable[[Results], str]
Picture = Callable[[Results], Any]  # returns a Figure of Matplotlib


def machine() -> dict[str, Any]:
    """Return the processor, the number of cores, the device, and the versions of the software."""
    names = [platform.processor() or platform.machine()]
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0],
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "flax": flax.__version__,
        "python": platform.python_version(),
    }


def described(machine: Mapping[str, Any]) -> str:
    """Return the description of a machine; results of older runs do not record Flax's version."""
    device = "no accelerator" if machine["device"] == "cpu" else machine["device"]
    names = {"jax": "JAX", "flax": "Flax", "python": "Python"}
    versions = [f"{name} {machine[key]}" for key, name in names.items() if key in machine]
    return f"{machine['processor']}, {machine['cores']} cores, {device}, {', '.join(versions)}"


def ending(name: str, results: Results) -> str:
    """Return the last paragraphs of a page: the machine, and the command of the benchmark."""
    return (
        f"Machine: {described(results['machine'])}.\n\n"
        f"Run `python -m benchmarks.{name}` to measure again; the numbers are in the JSON file of "
        "the same name."
    )


def number(value: float) -> str:
    """Return a number with three significant digits, and commas between thousands.

    >>> number(1698.6), number(0.48321), number(9.996)
    ('1,700', '0.483', '10.0')
    """
    if not value:
        return "0"
    digits = 2 - int(f"{value:.2e}".partition("e")[2])
    return f"{round(value, digits):,.{max(0, digits)}f}"


def factor(ratio: float) -> str:
    """Return a ratio with two decimals, or with three significant digits from 10 on."""
    return f"{ratio:.2f}" if ratio < 9.995 else number(ratio)


def markdown(rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table whose first row is the header."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([lines[0], f"| {' | '.join('---' for _ in rows[0])} |", *lines[1:]])


def page(path: pathlib.Path, text: Text, picture: Picture | None = None) -> str:
    """Return the page of a JSON file, with a link to the picture if there is one."""
    parts = [text(json.loads(path.read_text("utf-8")))]
    parts += [f"![picture of these results]({path.stem}.png)"] if picture else []
    return "\n\n".join(parts) + "\n"


def render(path: pathlib.Path, text: Text, picture: Picture | None = None) -> None:
    """Write the page, and the picture if there is one, next to the JSON file they are made from."""
    path.with_suffix(".md").write_text(page(path, text, picture), encoding="utf-8")
    if picture:
        results = json.loads(path.read_text("utf-8"))
        picture(results).savefig(path.with_suffix(".png"), dpi=110)


def finish(
    name: str,
    results: Results,
    text: Text,
    picture: Picture | None = None,
    *,
    folder: pathlib.Path | None = None,
    complete: bool = True,
) -> None:
    """Print the page of a run, and write its files.

    Args:
      name: the name of the files; that of the backend is added if it is not "cpu".
      results: the numbers.
      text: returns the page.
      picture: returns the picture, if the benchmark has one.
      folder: the folder of the files; this one if it is None.
      complete: False for a run of some cases only, which is written only to a given folder.
    """
    results = {"machine": machine(), **results}
    print(text(json.loads(json.dumps(results))))  # as the page is made from a file
    if folder is None and not complete:
        return
    folder, backend = folder or HERE, jax.default_backend()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name if backend == 'cpu' else f'{name}-{backend}'}.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    render(path, text, picture)
