"""The commands of ``python -m adalora_jax``, on each format."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file

import adalora_jax as adalora
from adalora_jax import checkpoint
from adalora_jax import huggingface as peft
from adalora_jax.__main__ import main
from adalora_jax._src.core import evaluation

CONFIG = adalora.AdaLoraConfig(
    total_step=8, init_r=4, target_r=2, tinit=1, tfinal=3, lora_alpha=8, target_modules=["query"]
)
SHAPES = {"encoder/0/query": (6, 5), "encoder/1/query": (6, 5), "encoder/1/out": (5, 6)}


@pytest.fixture(scope="module")
def trained():
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    adapters = {
        path: adalora.init_adapter(key, *shape, CONFIG)
        for key, (path, shape) in zip(keys, SHAPES.items())
    }
    params = {**adapters, "head": {"kernel": jnp.ones((6, 3)), "bias": jnp.zeros(3)}}
    tx = adalora.adalora(optax.adam(0.1), CONFIG)
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(6):
        grads = jax.tree.map(lambda leaf, t=t: jnp.cos(9 * leaf + t), params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.fixture
def saved(trained, tmp_path):
    checkpoint.save(tmp_path / "saved", *trained, CONFIG)
    return tmp_path / "saved"


def increments(adapters, masks, scale):
    """Return the active triplets' dense increments, with PyTorch's names and layout."""
    active = evaluation.apply_masks(adapters, {path: jnp.asarray(masks[path]) for path in adapters})
    return {
        path.replace("/", "."): np.asarray(adalora.delta_weight(a)).T for path, a in active.items()
    }


def test_inspect_prints_summary_of_checkpoint(trained, saved, capsys):
    main(["inspect", str(saved)])
    lines = capsys.readouterr().out.splitlines()
    ranks = adalora.ranks(adalora.allocator_state(trained[1]))
    assert lines[0] == f"checkpoint of adalora_jax {adalora.__version__} in {saved}"
    for path, rank in ranks.items():
        (row,) = [line.split() for line in lines if line.startswith(f"{path} ")]
        assert row[3:5] == [str(rank), "4"]
    text = "\n".join(lines)
    assert "triplets: 6 of 12 active, budget 6" in text
    assert "init_r 4, target_r 2, scale 2" in text
    assert "step: 6 of 8, in the final phase" in text
    assert "also trained: head/bias, head/kernel" in text
    stored = sum(f.stat().st_size for f in saved.rglob("*") if f.is_file())
    nbytes = sum(4 * 4 * (ins + outs + 1) for ins, outs in SHAPES.values())
    assert f"size: {nbytes:,} bytes of adapters; {stored:,} bytes on disk" in text


def test_inspect_reads_last_step_of_checkpoint_manager(trained, tmp_path, capsys):
    with ocp.CheckpointManager(tmp_path) as manager:
        for step in (2, 10):
            args = checkpoint.save_args(*trained, CONFIG, step=step)
            manager.save(step, args=args)
            manager.wait_until_finished()
    main(["inspect", str(tmp_path)])
    assert "step: 10 of 8" in capsys.readouterr().out


def test_export_to_peft_then_to_lora_preserves_increments(trained, saved, tmp_path, capsys):
    masks = adalora.allocator_state(trained[1]).masks
    adapters = adalora.adapters(trained[0])
    want = increments(adapters, masks, CONFIG.scaling)
    out = tmp_path / "as-peft"
    main(["export", str(saved), "--to", "peft", "--out", str(out), "--task-type", "CAUSAL_LM"])
    assert json.loads((out / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    loaded = peft.load_pretrained(out)
    assert adalora.ranks(loaded.masks) == adalora.ranks(masks)
    got = increments(adalora.adapters(loaded.adapters), loaded.masks, loaded.config.scaling)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-6, err_msg=name)

    capsys.readouterr()
    main(["inspect", str(out)])
    text = capsys.readouterr().out
    assert text.startswith(f"adapter of PEFT in {out}")
    assert "triplets: 6 of" in text

    main(["export", str(out), "--to", "lora", "--out", str(tmp_path / "as-lora")])
    tensors = load_file(tmp_path / "as-lora/adapter_model.safetensors")
    for name, delta in want.items():
        a, b = (tensors.get(f"base_model.model.{name}.lora_{x}.weight") for x in "AB")
        if adalora.ranks(masks)[name.replace(".", "/")]:
            np.testing.assert_allclose(b @ a, delta, rtol=1e-5, atol=1e-6)
        else:
            assert a is None


def test_export_to_merged_base_adds_increments_and_shows_progress(trained, saved, tmp_path):
    rng = np.random.default_rng(0)
    base = {
        f"model.{path.replace('/', '.')}.weight": rng.normal(size=(outs, ins)).astype(np.float32)
        for path, (ins, outs) in SHAPES.items()
    }
    base |= {"model.head.weight": np.zeros((3, 6), np.float32)}
    base |= {"model.head.bias": np.ones(3, np.float32), "model.norm.weight": np.ones(6, np.float32)}
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base/model.safetensors")
    names = {path: f"model.{path.replace('/', '.')}" for path in [*SHAPES, "head"]}
    (tmp_path / "names.json").write_text(json.dumps(names))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "adalora_jax", "export", str(saved), "--to", "merged"),
            *("--base", "base", "--out", "merged", "--names", "names.json"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "merging: 100%" in done.stderr
    merged = load_file(tmp_path / "merged/model.safetensors")
    masks = adalora.allocator_state(trained[1]).masks
    deltas = increments(adalora.adapters(trained[0]), masks, CONFIG.scaling)
    for name, delta in deltas.items():
        want = base[f"model.{name}.weight"] + delta
        np.testing.assert_allclose(merged[f"model.{name}.weight"], want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(merged["model.head.weight"], trained[0]["head"]["kernel"].T)
    np.testing.assert_array_equal(merged["model.norm.weight"], base["model.norm.weight"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nothing"], "nothing`: is not a folder"),
        (["inspect", "."], "is not a checkpoint of adalora_jax"),
        (["export", "saved", "--to", "merged", "--out", "x"], "`--to merged`: needs --base"),
        (
            ["export", "saved", "--to", "peft", "--out", "x", "--base", "y"],
            "`--base y`: is only for --to merged",
        ),
        (
            [
                "export",
                "saved",
                "--to",
                "merged",
                "--out",
                "x",
                "--base",
                "y",
                "--task-type",
                "CAUSAL_LM",
            ],
            "`--task-type CAUSAL_LM`: is only for --to peft",
        ),
        (["export", "saved", "--to", "peft", "--out", "saved"], "`--out saved`: exists"),
        (["export", "saved", "--to", "peft", "--out", "x", "--names", "bert"], "matches no pair"),
        (
            ["export", "saved", "--to", "peft", "--out", "x", "--names", "mars"],
            "`names='mars'`: must be one",
        ),
        (["export", "saved", "--to", "merged", "--out", "x", "--base", "gone"], "gone"),
    ],
)
def test_invalid_arguments_exit_with_one_line(saved, monkeypatch, arguments, message):
    monkeypatch.chdir(saved.parent)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert message in str(stop.value.code)
    assert "\n" not in str(stop.value.code)


def test_inspect_finds_adapter_whose_save_was_killed(saved, tmp_path, capsys):
    out = tmp_path / "out"
    main(["export", str(saved), "--to", "peft", "--out", str(out)])
    (out / "adapter_config.json").rename(out / ".adapter_config.json.previous.tmp")
    main(["inspect", str(out)])
    assert f"adapter of PEFT in {out}" in capsys.readouterr().out


@pytest.mark.parametrize("to", ["peft", "lora"])
def test_unwritable_output_exits_with_one_line(saved, tmp_path, to):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    with pytest.raises(SystemExit) as stop:
        main(["export", str(saved), "--to", to, "--out", str(out)])
    assert f"`directory='{out}'`: cannot be written: Not a directory" in str(stop.value.code)


def test_interrupt_exits_with_one_line(saved, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "restore", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(saved)])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_help_is_printed_and_missing_names_file_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    assert "--names" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["export", "x", "--to", "peft", "--out", "y", "--names", "gone.json"])
    assert "gone.json" in capsys.readouterr().err
