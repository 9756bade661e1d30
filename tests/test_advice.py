"""Advice before training: the counts of bits, the settings, and what the sentences rest on."""

import json
import math
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adalora_jax as adalora
from adalora_jax import __main__ as command
from adalora_jax._src import advice

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))

from benchmarks.quality import crossover_report, methods  # noqa: E402

# Bits in the training data of the quality study, as docs/explanation/when-it-pays.md counts them.
WANTED = {"digits": 50 * math.log2(5), "docstrings": 200 * math.log2(10), "prose": 19200 * 2.6}
COMMON = ["--examples", "300", "--rank", "1", "--steps", "300"]
LABELS = ["--classes", "4"]
TOKENS = ["--tokens", "64"]
SIZE = ["--parameters", "1792"]


def comparisons():
    """Return ``(ratio, gain, sign, LoRA's best rate, AdaLoRA's)`` of each stored comparison."""
    found = []
    for name in ("quality", "crossover"):
        results = json.loads((ROOT / "benchmarks" / f"{name}.json").read_text("utf-8"))
        for key, cell in results["cells"].items():
            task, method, budget = key.split("/")
            lora = results["cells"].get(f"{task}/lora/{budget}")
            if method != "adalora" or not lora:
                continue
            about = results["study"]["tasks"][task]
            wanted = about.get("bits wanted") or WANTED[task]
            pairs = zip(cell["test of seeds"], lora["test of seeds"])
            gain = about["sign"] * statistics.mean(ours - theirs for ours, theirs in pairs)
            ratio = wanted / (advice.CAPACITY * lora["parameters"])
            found.append((ratio, gain, about["sign"], lora["rate"], cell["rate"]))
    return found


def run(capsys, *arguments):
    command.main(["advise", *arguments])
    return capsys.readouterr().out


def test_sentences_agree_with_stored_comparisons():
    found = comparisons()
    groups = {
        advice.CLASSIFIERS: [one for one in found if one[2] > 0],
        advice.LANGUAGE_BELOW: [one for one in found if one[2] < 0 and one[0] < 1],
        advice.LANGUAGE_ABOVE: [one for one in found if one[2] < 0 and one[0] >= 1],
    }
    for measured, group in groups.items():
        low, high = (f"{end(one[0] for one in group):.2g}" for end in (min, max))
        assert [float(low), float(high)] == [measured.lowest, measured.highest]
        assert f"In {len(group)} comparisons on " in measured.sentences
        assert f"from {low} to {high}," in measured.sentences
        gains = [f"{end(one[1] for one in group):.2g}" for end in (min, max)]
        assert f"AdaLoRA gained {' to '.join(gains)} " in measured.sentences
        if measured is not advice.LANGUAGE_BELOW:
            ahead = sum(one[1] > 0 for one in group)
            assert f"and was ahead in {ahead}." in measured.sentences
    for tried, column in ((advice.LORA_RATES, 3), (advice.ADALORA_RATES, 4)):
        best = [one[column] for one in found]
        assert (min(best), max(best)) == (tried[0], tried[-1])
    times = [ours / theirs for *_, theirs, ours in found]
    often = sum(factor > 4.9 for factor in times)
    assert f"{min(times):.2g} to {max(times):.2g} times LoRA's" in advice.RATES
    assert f"at least 5 times in {often} of {len(times)}." in advice.RATES


def test_settings_are_those_of_the_candidate_that_the_rule_chose_and_its_results_are_stated():
    results = json.loads((ROOT / "benchmarks/crossover.json").read_text("utf-8"))
    assert crossover_report.recommended(results) == "unrevived4"
    studied = methods.METHODS["unrevived4"].adalora_config(3, 250, ("q",), ())
    ours = adalora.AdaLoraConfig.recommended(250, 3, target_modules=["q"])
    assert ours.scaling == studied.scaling
    assert ours == studied.replace(scale=1.0, lora_alpha=ours.lora_alpha)
    best = [cell["rate"] for key, cell in results["cells"].items() if "/unrevived4/" in key]
    assert f"settings above were from {min(best)} to {max(best)}." in advice.RATES
    assert f"at most {max(best)}:" in advice.RATES
    there = crossover_report.points(results)
    for sign, names in crossover_report.CANDIDATE_GROUPS.items():
        group = [there[name] for name in names]
        ratios = [f"{end(point.ratio for point in group):.2g}" for end in (min, max)]
        gains = [
            statistics.mean(crossover_report.differences(results, point, "unrevived4", "lora"))
            for point in group
        ]
        gains = [f"{end(gains):.2g}" for end in (min, max)]
        assert " to ".join(ratios) in advice.SETTINGS, sign
        assert " to ".join(gains) in advice.SETTINGS, sign


def test_integers_of_numpy_do_not_overflow():
    int32: Any = np.int32
    small: Any = np.uint8(100)
    assert advice.bits_of_tokens(int32(100_000), int32(100_000)) == 1e10
    shapes = [(int32(50_000), int32(50_000), int32(100_000))]
    assert advice.lora_parameters(shapes, int32(4)) == 4 * 10**10
    found = advice.advise(10.0, int32(2**31 - 5), small, small, language_model=True)
    assert found.held == 2 * (2**31 - 5)
    assert (found.config.init_r, found.config.tfinal) == (400, 30)


def test_information_and_capacity_are_those_of_the_study():
    assert advice.bits_of_labels(50, 5) == pytest.approx(116, abs=0.5)
    assert advice.bits_of_tokens(300, 64, 2.6) == pytest.approx(49_920)
    # All 24 matrices of digits are 64 x 64; 6,144 bits at rank 1.
    parameters = advice.lora_parameters([(64, 64, 20), (64, 64, 4)], rank=1)
    found = advice.advise(116, parameters, rank=1, steps=200, language_model=False)
    assert found.held == 2 * 3072
    assert found.ratio == pytest.approx(116 / 6144)


@pytest.mark.parametrize(
    ("wanted", "language", "measured", "near"),
    [
        (1, True, advice.LANGUAGE_BELOW, False),
        (200, True, advice.LANGUAGE_BELOW, True),
        (999, True, advice.LANGUAGE_BELOW, False),
        (1000, True, advice.LANGUAGE_ABOVE, False),
        (20_000, True, advice.LANGUAGE_ABOVE, True),
        (100_000, True, advice.LANGUAGE_ABOVE, False),
        (1, False, advice.CLASSIFIERS, False),
        (100, False, advice.CLASSIFIERS, True),
        (10_000, False, advice.CLASSIFIERS, True),
        (20_000, False, advice.CLASSIFIERS, False),
    ],
)
def test_advice_depends_on_model_and_ratio_and_names_ratios_that_were_not_measured(
    wanted, language, measured, near
):
    found = advice.advise(wanted, parameters=500, rank=1, steps=100, language_model=language)
    sentences = measured.sentences
    assert found.measured == (sentences if near else f"{sentences} {advice.UNMEASURED}")
    assert advice.UNMEASURED not in sentences


@pytest.mark.parametrize("steps", [1, 9, 10, 333])
def test_settings_are_those_of_the_study_and_paste_as_printed(steps):
    found = advice.advise(1000.0, parameters=800, rank=4, steps=steps, language_model=True)
    config = found.config
    assert (config.init_r, config.target_r, config.scaling) == (16, 4, 1)
    assert (config.tinit, config.tfinal) == (steps // 10, 3 * steps // 10)
    line = re.search(r"^AdaLoraConfig\.recommended\(.*\)$", advice.report(found), re.MULTILINE)
    assert line
    assert eval(line[0], {"AdaLoraConfig": adalora.AdaLoraConfig}) == config


def test_command_counts_labels_or_tokens_and_parameters_or_shapes(capsys):
    text = run(capsys, *COMMON, *LABELS, *SIZE)
    assert re.search(r"^the data want +600 bits$", text, re.MULTILINE)
    assert re.search(r"^the adapters hold +3,584 bits, 2 per parameter$", text, re.MULTILINE)
    assert re.search(r"^ratio +0.167$", text, re.MULTILINE)
    assert "comparisons on classifiers" in text
    text = run(capsys, *COMMON, *TOKENS, *SIZE)
    assert "the data want       19,200 bits" in text
    assert "comparisons on language models" in text
    assert "the data want       48,000 bits" in run(
        capsys, *COMMON, *TOKENS, "--bits", "2.5", *SIZE
    )
    text = run(capsys, *COMMON, *LABELS, "--shapes", "64x32*2", "128x128")
    assert f"{2 * (2 * 96 + 256)} bits, 2 per parameter" in text
    assert run(capsys, *COMMON, *LABELS, "--shapes", "64x32*2", "--shapes", "128x128") == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", "1", *SIZE], "`classes=1`: must be at least 2"),
        (["--examples", "0", *LABELS, *SIZE], "`examples=0`: must be at least 1"),
        (["--tokens", "-3", *SIZE], "`tokens=-3`: must be at least 1"),
        ([*TOKENS, "--bits", "0", *SIZE], "`bits=0.0`: must be positive"),
        ([*TOKENS, "--bits", "nan", *SIZE], "`bits=nan`: must be positive"),
        ([*LABELS, "--bits", "2", *SIZE], "`--bits 2.0`: is only for --tokens"),
        ([*LABELS, *SIZE, "--rank", "0"], "`rank=0`: must be an integer of at least 1"),
        ([*LABELS, *SIZE, "--steps", "0"], "`steps=0`: must be an integer of at least 1"),
        ([*LABELS, *SIZE, "--rank", "900"], "`parameters=1792`: are too few for rank=900"),
        ([*LABELS, "--parameters", f"{10**60}"], "the largest float32"),
        ([*LABELS, "--shapes", "8x0"], "`shapes=(8, 0, 1)`: has a number below 1"),
        (
            [*LABELS, "--shapes", "64x64", "3x64*2", "--rank", "4"],
            "`rank=4`: exceeds the smaller side of a matrix of 3 x 64",
        ),
    ],
)
def test_invalid_numbers_exit_with_one_line(arguments, message):
    with pytest.raises(SystemExit) as stop:
        command.main(["advise", *COMMON, *arguments])
    assert message in str(stop.value.code)
    assert "\n" not in str(stop.value.code)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (SIZE, "one of the arguments --classes --tokens is required"),
        ([*LABELS, *TOKENS, *SIZE], "--tokens: not allowed with argument --classes"),
        (LABELS, "one of the arguments --parameters --shapes is required"),
        ([*LABELS, *SIZE, "--shapes", "4x4"], "--shapes: not allowed with argument --parameters"),
        ([*LABELS, "--shapes", "4by4"], "argument --shapes: 4by4: must be INxOUT"),
        (["--classes", "2.5", *SIZE], "argument --classes: invalid int value"),
    ],
)
def test_invalid_options_exit_with_usage(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        command.main(["advise", *COMMON, *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_page_shows_the_output_of_its_command(capsys):
    page = (ROOT / "docs/reference/command-line.md").read_text("utf-8")
    pattern = r"^\$ python -m adalora_jax (advise .*?[^\\])\n(.*?)^```$"
    shown = re.search(pattern, page, re.MULTILINE | re.DOTALL)
    assert shown
    arguments = shown[1].replace("\\\n", " ").split()
    assert run(capsys, *arguments[1:]) == shown[2]
