"""Advice before training: the information in the data against the capacity of the adapters."""

from __future__ import annotations

import argparse
import math
import re
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from adalora_jax._src.core import checks, text
from adalora_jax._src.core.config import AdaLoraConfig

CAPACITY = 2  # bits per parameter: Allen-Zhu and Li 2024, https://arxiv.org/abs/2404.05405
TOKEN_BITS = 1.0  # default information per token

# All sentences of the advice, and the ranges of the measurements that they rest on: the
# comparisons of AdaLoRA with LoRA in benchmarks/quality.json and crossover.json. A test compares
# these numbers with the files.
LORA_RATES = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
ADALORA_RATES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1)


class Measured(NamedTuple):
    """What comparisons of AdaLoRA, as in PEFT, with LoRA of the same rank found, and the advice."""

    lowest: float  # ratio
    highest: float
    sentences: str


CLASSIFIERS = Measured(
    *(0.002, 12),
    "In 13 comparisons on classifiers, at ratios from 0.002 to 12, AdaLoRA gained -2 to 1.9 "
    "percentage points over LoRA of the same rank, and was ahead in 4. Start with LoRA, which "
    "costs less. AdaLoRA also shows which layers need rank.",
)
LANGUAGE_BELOW = Measured(
    *(0.14, 0.43),
    "In 2 comparisons on language models at ratios below 1, from 0.14 to 0.43, AdaLoRA gained "
    "-0.0083 to 0.0047 bits per character over LoRA of the same rank. Start with LoRA, which "
    "costs less. AdaLoRA also shows which layers need rank.",
)
LANGUAGE_ABOVE = Measured(
    *(1.4, 57),
    "In 9 comparisons on language models at ratios above 1, from 1.4 to 57, AdaLoRA gained -0.012 "
    "to 0.067 bits per character over LoRA of the same rank, and was ahead in 7. If the size of "
    "the adapters is limited, compare the two on validation examples, each at its own best "
    "learning rate. Otherwise use LoRA at a higher rank.",
)
UNMEASURED = "No ratio near this one was measured."
CAVEAT = (
    "The models were small and the ratio is a rough count: this is a place to start, not a "
    "prediction."
)
SETTINGS = (
    "They were measured at rank 1 only. There they were ahead of LoRA by 0.041 to 0.12 bits per "
    "character on three language models (ratios from 17 to 26). On three classifiers (0.36 to 3), "
    "the difference was -1.7 to 1.6 percentage points."
)
RATES = (
    "The best rates of the comparisons were in these ranges; those of the settings above were from "
    "0.02 to 0.05. If you know a good rate for LoRA, start with 10 times that, but at most 0.05: "
    "AdaLoRA's best rate was 0.4 to 25 times LoRA's, and at least 5 times in 13 of 24. Try further "
    "rates if the best is the first or the last."
)


class Advice(NamedTuple):
    """Result of :func:`advise`.

    Attributes:
      wanted: bits of information in the training data.
      held: bits that the adapters can hold.
      ratio: ``wanted / held``.
      measured: the sentences on what was measured with such models.
      config: the starting settings of AdaLoRA.
    """

    wanted: float
    held: float
    ratio: float
    measured: str
    config: AdaLoraConfig


def bits_of_labels(examples: int, classes: int) -> float:
    """Return the information in the labels of a data set, ``examples · log2(classes)``.

    Raises:
      ValueError: ``examples`` is below 1, or ``classes`` below 2.

    >>> bits_of_labels(1000, 4)
    2000.0
    """
    _at_least("examples", examples, 1)
    _at_least("classes", classes, 2)
    return examples * math.log2(classes)


def bits_of_tokens(examples: int, tokens: int, bits: float = TOKEN_BITS) -> float:
    """Return the information in the trained-on tokens of a data set.

    Args:
      examples: the number of examples.
      tokens: the number of tokens, or characters, per example that the loss includes.
      bits: the information per token: the base model's loss in nats, divided by ln 2.

    Raises:
      ValueError: a number is below 1, or ``bits`` is not positive.

    >>> bits_of_tokens(300, 64, bits=2.5)
    48000.0
    """
    _at_least("examples", examples, 1)
    _at_least("tokens", tokens, 1)
    checks.number("bits", bits, "positive", lambda value: value > 0)
    return int(examples) * int(tokens) * float(bits)


def lora_parameters(shapes: Sequence[tuple[int, int, int]], rank: int) -> int:
    """Return the number of parameters of LoRA adapters, ``Σ count · rank · (in + out)``.

    Args:
      shapes: ``(in, out, count)`` of the adapted matrices.
      rank: the rank of all of them.

    Raises:
      ValueError: a number is below 1, or ``rank`` exceeds the smaller side of a matrix.

    >>> lora_parameters([(768, 768, 24), (768, 3072, 12)], rank=8)
    663552
    """
    _at_least("rank", rank, 1)
    for ins, outs, count in shapes:
        if min(ins, outs, count) < 1:
            raise ValueError(
                f"`shapes={(ins, outs, count)}`: has a number below 1; pass (in, out, count)."
            )
        if rank > min(ins, outs):
            raise ValueError(
                f"`rank={checks.shown(rank)}`: exceeds the smaller side of a matrix of "
                f"{ins} x {outs}; pass a smaller rank, or leave the matrix out."
            )
    # As ints of Python: those of NumPy and JAX overflow.
    return int(rank) * sum(int(count) * (int(ins) + int(outs)) for ins, outs, count in shapes)


def advise(
    wanted: float, parameters: int, rank: int, steps: int, *, language_model: bool
) -> Advice:
    """Compare data and adapters, and return what was measured and settings to start with.

    Args:
      wanted: bits of information in the data, of :func:`bits_of_labels` or :func:`bits_of_tokens`.
      parameters: the number of parameters of the adapters at their final rank.
      rank: the final rank of the adapters, on average.
      steps: the number of optimizer steps.
      language_model: whether the model predicts tokens; if not, classes.

    Raises:
      ValueError: a number is below 1 or too large for a config, or ``parameters`` is too small for
        the rank.

    >>> wanted = bits_of_labels(1000, 4)
    >>> advice = advise(wanted, parameters=500, rank=1, steps=200, language_model=False)
    >>> advice.ratio, advice.config.tinit, advice.config.tfinal
    (2.0, 20, 60)
    """
    checks.number("wanted", wanted, "positive", lambda value: value > 0)
    rank = checks.integer("rank", rank, minimum=1)
    if parameters < 2 * rank:
        raise ValueError(
            f"`parameters={parameters}`: are too few for rank={rank}, which has at least "
            f"{2 * rank}; pass the number of all adapters."
        )
    _at_least("parameters", parameters, 1)
    steps = checks.integer("steps", steps, minimum=1)
    held = float(CAPACITY * int(parameters))
    ratio = wanted / held
    language = LANGUAGE_BELOW if ratio < 1 else LANGUAGE_ABOVE
    lowest, highest, measured = language if language_model else CLASSIFIERS
    if not lowest <= ratio <= highest:
        measured = f"{measured} {UNMEASURED}"
    config = AdaLoraConfig.recommended(steps, rank)
    return Advice(wanted, held, ratio, measured, config)


def report(advice: Advice) -> str:
    """Return the advice as plain text."""
    config = advice.config
    arguments = f"total_step={config.total_step}, target_r={config.target_r}"
    bits = [
        ("the data want", f"{advice.wanted:,.0f}", "bits"),
        ("the adapters hold", f"{advice.held:,.0f}", f"bits, {CAPACITY} per parameter"),
        ("ratio", f"{advice.ratio:.3g}", ""),
    ]
    rates = [("LoRA", *LORA_RATES), ("AdaLoRA", *ADALORA_RATES)]
    width = max(map(len, rates))
    return "\n".join(
        [
            _rows(bits),
            "",
            _wrapped(f"{advice.measured} {CAVEAT}"),
            "",
            "Settings to start AdaLoRA with:",
            "",
            f"AdaLoraConfig.recommended({arguments})",
            "",
            _wrapped(SETTINGS),
            "",
            "Learning rates to try, of Adam at scale 1:",
            "",
            text.table([(*row, *[""] * (width - len(row))) for row in rates]),
            "",
            _wrapped(RATES),
        ]
    )


def _rows(rows: Sequence[tuple[str, str, str]]) -> str:
    names, numbers = (max(len(row[i]) for row in rows) for i in (0, 1))
    return "\n".join(
        f"{name:<{names}}   {value:>{numbers}} {unit}".rstrip() for name, value, unit in rows
    )


def _wrapped(sentences: str) -> str:
    return textwrap.fill(sentences, 80, break_on_hyphens=False)


def _at_least(name: str, value: int, minimum: int) -> None:
    checks.number(name, value, f"at least {minimum}", lambda number: number >= minimum)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command ``advise``, and the function that runs it."""
    option = parser.add_argument
    option("--examples", type=int, required=True, metavar="N", help="number of training examples")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--classes", type=int, metavar="C", help="number of classes of the labels")
    data.add_argument(
        "--tokens",
        type=int,
        metavar="T",
        help="tokens, or characters, per example that the loss includes",
    )
    option(
        "--bits",
        type=float,
        metavar="B",
        help="with --tokens: bits of information per token, the base model's loss in nats / 0.693; "
        f"default: {TOKEN_BITS:g}",
    )
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument(
        "--parameters", type=int, metavar="P", help="parameters of the adapters at the final rank"
    )
    size.add_argument(
        "--shapes",
        type=_shape,
        nargs="+",
        action="extend",
        metavar="INxOUT*COUNT",
        help="sizes of the adapted matrices, such as 4096x4096*32; COUNT is 1 by default",
    )
    option("--rank", type=int, required=True, metavar="R", help="final rank, on average")
    option("--steps", type=int, required=True, metavar="S", help="number of optimizer steps")
    parser.set_defaults(run=_run)


def _shape(value: str) -> tuple[int, int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)(?:\*(\d+))?", value, re.ASCII)
    if not found:
        raise argparse.ArgumentTypeError(f"{value}: must be INxOUT or INxOUT*COUNT")
    ins, outs, count = found.groups("1")
    return int(ins), int(outs), int(count)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.tokens is None:
        if arguments.bits is not None:
            raise ValueError(f"`--bits {arguments.bits}`: is only for --tokens; leave it out.")
        wanted = bits_of_labels(arguments.examples, arguments.classes)
    else:
        bits = TOKEN_BITS if arguments.bits is None else arguments.bits
        wanted = bits_of_tokens(arguments.examples, arguments.tokens, bits)
    parameters = arguments.parameters
    if parameters is None:
        parameters = lora_parameters(arguments.shapes, arguments.rank)
    language = arguments.tokens is not None
    given = wanted, parameters, arguments.rank, arguments.steps
    print(report(advise(*given, language_model=language)))
