"""Checkpoints: restored values, recovery from a kill, and errors."""

import json
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training import train_state
from jax.sharding import NamedSharding, PartitionSpec
from support.toy_problem import adapters as fresh
from support.toy_problem import assert_same_bits, batches, train_step

import adalora_jax as adalora
from adalora_jax._src import checkpoint

CONFIG = adalora.AdaLoraConfig(total_step=9, init_r=4, target_r=2, tinit=2, tfinal=3)
RUN = Path(__file__).parent / "resumable_run.py"


def optimizer():
    return optax.chain(optax.clip_by_global_norm(1.0), adalora.adalora(optax.adam(0.02), CONFIG))


@pytest.fixture(scope="module")
def trained():
    """Return adapters and optimizer state from the middle of the budgeting phase."""
    tx = optimizer()
    adapters, data = fresh(CONFIG), batches(CONFIG)
    state, step = tx.init(adapters), jax.jit(train_step(tx, CONFIG))
    for t in range(5):
        adapters, state, _ = step(adapters, state, jax.tree.map(lambda a, t=t: a[t], data))
    return adapters, state


@pytest.fixture
def saved(trained, tmp_path):
    checkpoint.save(tmp_path / "c", *trained, CONFIG)
    return tmp_path / "c"


def test_save_refuses_adapters_of_rank_0(tmp_path):
    config = adalora.AdaLoraConfig(total_step=4, init_r=4, target_r=2)
    adapter = adalora.init_adapter(jax.random.key(0), 6, 5, config)
    adapters = {"a": adapter, "b": jax.tree.map(lambda leaf: leaf[:0], adapter)}
    opt_state = adalora.adalora(optax.adam(1e-3), config).init(adapters)
    with pytest.raises(ValueError, match=r"`adapters`: 'b' has rank 0.*compact"):
        checkpoint.save(tmp_path / "run", adapters, opt_state, config)
    assert not list(tmp_path.iterdir())


def test_restore_is_bit_exact(trained, saved):
    back = checkpoint.restore(saved, optimizer(), config=CONFIG)
    assert_same_bits((back.adapters, back.opt_state), trained)
    assert (back.step, back.config, back.version) == (5, CONFIG, adalora.__version__)
    assert_same_bits(back.allocator, adalora.allocator_state(trained[1]))


def test_restore_is_bit_exact_with_abstract_target_and_without_target(trained, saved):
    abstract = jax.eval_shape(lambda: trained)
    back = checkpoint.restore(saved, target=abstract)
    assert_same_bits((back.adapters, back.opt_state), trained)
    bare = checkpoint.restore(saved)
    assert_same_bits(bare.adapters, trained[0])
    assert_same_bits(bare.opt_state["1/allocator/step"], trained[1][1].allocator.step)
    assert_same_bits(bare.opt_state["1/inner/0/mu/down/q"], trained[1][1].inner[0].mu["down"].q)
    assert_same_bits(bare.allocator, adalora.allocator_state(trained[1]))


def test_modules_to_save_are_restored(tmp_path):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="head")(nn.Dense(4, name="query")(x))

    config = CONFIG.replace(target_modules=["query"], modules_to_save=["head"])
    variables = Model().init(jax.random.key(0), jnp.ones((2, 5)))
    adapters = adalora.linen.adapt(Model(), config).init(
        jax.random.key(1), variables, jnp.ones((2, 5))
    )
    tx = adalora.adalora(optax.adam(0.1), config)
    checkpoint.save(tmp_path / "c", adapters, tx.init(adapters), config, step=77)
    target = jax.eval_shape(lambda: (adapters, tx.init(adapters)))
    back = checkpoint.restore(tmp_path / "c", target=target)
    assert_same_bits((back.adapters, back.opt_state), (adapters, tx.init(adapters)))
    assert back.step == 77
    alone = checkpoint.restore(tmp_path / "c", tx)
    assert_same_bits((alone.adapters, alone.opt_state), (adapters, tx.init(adapters)))
    files = [file.name for file in (tmp_path / "c").rglob("*")]
    stored = json.loads((tmp_path / "c/adalora/metadata").read_text())["arrays"]
    assert files
    assert not any("query/kernel" in name for name in stored), "the base is not saved"


def test_single_layer_and_prng_keys_are_restored(tmp_path):
    config = CONFIG.replace(target_modules=".*")
    variables = nn.Dense(4).init(jax.random.key(0), jnp.ones((2, 5)))
    adapters = adalora.linen.adapt(nn.Dense(4), config).init(
        jax.random.key(1), variables, jnp.ones((2, 5))
    )
    tx = adalora.adalora(optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(3))), config)
    state = tx.init(adapters)
    checkpoint.save(tmp_path / "c", adapters, state, config)
    back = checkpoint.restore(tmp_path / "c", tx)
    assert_same_bits(back.adapters, adapters)
    keys = [
        jax.tree.map(lambda x: jax.random.key_data(x) if checkpoint._is_key(x) else x, s)
        for s in (back.opt_state, state)
    ]
    assert_same_bits(*keys)
    assert list(back.allocator.masks) == list(back.allocator.sensitivity) == [""]


def test_nnx_model_and_optimizer_are_restored(tmp_path):
    config = CONFIG.replace(target_modules="all-linear")
    base = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 3, rngs=nnx.Rngs(1)))

    def fresh_run():
        model = adalora.nnx.adapt(base, config)
        return model, nnx.Optimizer(model, optimizer(), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer, x):
        grads = nnx.grad(lambda m: (m(x) ** 2).mean(), argnums=nnx.DiffState(0, nnx.LoRAParam))
        optimizer.update(model, grads(model))

    model, optim = fresh_run()
    for t in range(3):
        step(model, optim, jnp.full((2, 6), t))
    mine = nnx.state(model, nnx.LoRAParam)
    checkpoint.save(tmp_path / "c", mine, optim.opt_state, config)
    again, optim_again = fresh_run()
    target = nnx.state(again, nnx.LoRAParam), optim_again.opt_state
    back = checkpoint.restore(tmp_path / "c", target=target)
    nnx.update(again, back.adapters)
    optim_again.opt_state = back.opt_state
    optim_again.step[...] = back.step
    # The names are those of linen, so a dict of adapters can be read from it.
    assert_same_bits(checkpoint.restore(tmp_path / "c").adapters, adalora.nnx.adapters(model))
    for which, other in ((model, again), (optim, optim_again)):
        assert_same_bits(nnx.to_pure_dict(nnx.state(which)), nnx.to_pure_dict(nnx.state(other)))
    step(model, optim, jnp.ones((2, 6)))
    step(again, optim_again, jnp.ones((2, 6)))
    assert_same_bits(adalora.nnx.adapters(again), adalora.nnx.adapters(model))


def test_checkpoint_manager_keeps_best_steps(trained, tmp_path):
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, best_fn=lambda metrics: metrics["accuracy"], best_mode="max"
    )
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        for t, accuracy in enumerate([0.5, 0.9, 0.7, 0.6]):
            args = checkpoint.save_args(*trained, CONFIG, step=t)
            manager.save(t, args=args, metrics={"accuracy": accuracy})
        manager.wait_until_finished()
        assert manager.best_step() == 1
        assert sorted(manager.all_steps()) == [1, 2]
    back = checkpoint.restore(tmp_path / "1", optimizer())
    assert_same_bits((back.adapters, back.opt_state), trained)
    assert back.step == 1
    with pytest.raises(ValueError, match=r"not a checkpoint of adalora_jax.*of its steps: 1, 2"):
        checkpoint.restore(tmp_path)


def test_train_state_is_restored_by_standard_checkpointer(trained, tmp_path):
    adapters, _ = trained
    state = train_state.TrainState.create(apply_fn=print, params=adapters, tx=optimizer())
    state = state.apply_gradients(grads=jax.tree.map(jnp.ones_like, adapters))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", state)
        checkpointer.wait_until_finished()
        target = jax.eval_shape(lambda: state)
        where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), target
        )
        back = checkpointer.restore(tmp_path / "c", target)
    assert_same_bits(back, jax.tree.map(jnp.asarray, state))


def run(*args):
    return subprocess.Popen(
        [sys.executable, str(RUN), *map(str, args)], stdout=subprocess.PIPE, text=True
    )


def finish(process):
    out, _ = process.communicate(timeout=300)
    return process.returncode, int(out.split()[1])


def assert_same_result(first, second):
    first, second = np.load(first), np.load(second)
    assert first.files == second.files
    for name in first.files:
        assert first[name].tobytes() == second[name].tobytes(), name


@pytest.mark.slow
def test_run_killed_during_save_resumes_bit_exactly(tmp_path):
    whole = run(tmp_path / "whole", tmp_path / "whole.npz")
    assert finish(run(tmp_path / "cut", tmp_path / "cut.npz", 6)) == (-9, 0)
    assert not (tmp_path / "cut.npz").exists()
    code, start = finish(run(tmp_path / "cut", tmp_path / "cut.npz"))
    assert code == 0
    assert start in (4, 6), "the save of step 6 was under way"
    assert finish(whole) == (0, 0)
    assert_same_result(tmp_path / "whole.npz", tmp_path / "cut.npz")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_run_killed_at_random_times_resumes_bit_exactly(tmp_path, seed):
    rng = np.random.default_rng(seed)
    assert finish(run(tmp_path / "whole", tmp_path / "whole.npz")) == (0, 0)
    kills = 0
    while not (tmp_path / "cut.npz").exists():
        process = run(tmp_path / "cut", tmp_path / "cut.npz")
        process.stdout.readline()  # the run has begun
        if kills < 4:
            try:
                process.wait(rng.uniform(0, 2.0))
            except subprocess.TimeoutExpired:
                kills += 1
                process.kill()
        process.communicate()
    assert kills
    assert_same_result(tmp_path / "whole.npz", tmp_path / "cut.npz")


def test_restore_uses_shardings_of_target(trained, saved):
    """A checkpoint saved from one device is restored with the target's shardings."""
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    back = checkpoint.restore(saved, target=jax.tree.map(place, trained))
    assert_same_bits((back.adapters, back.opt_state), trained)
    assert back.adapters["down"].p.sharding.mesh == mesh


def test_mismatched_config_model_or_optimizer_raises_with_differences(saved):
    other = CONFIG.replace(init_r=5, beta1=0.5)
    with pytest.raises(ValueError, match=r"beta1=0.85 instead of 0.5, init_r=4 instead of 5"):
        checkpoint.restore(saved, config=other)
    tx = adalora.adalora(optax.sgd(0.1, momentum=0.9), CONFIG)
    tx = optax.chain(optax.clip_by_global_norm(1.0), tx)
    with pytest.raises(ValueError, match=r"missing \(.*0/trace/down/p, .*not expected \("):
        checkpoint.restore(saved, tx)
    bigger = fresh(CONFIG, shapes={"down": (7, 3, ()), "key": (4, 4, ()), "layers": (3, 5, (2,))})
    target = bigger, optimizer().init(bigger)
    with pytest.raises(ValueError, match=r"down/q \(float32\[4, 5\], not float32\[4, 7\]\)"):
        checkpoint.restore(saved, target=target)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), fresh(CONFIG))
    with pytest.raises(ValueError, match=r"float32\[4, 3\], not bfloat16\[4, 3\]"):
        checkpoint.restore(saved, target=(half, optimizer().init(half)))


def test_foreign_folder_or_optimizer_state_raises(tmp_path, trained):
    with pytest.raises(FileNotFoundError, match="pass the folder of a checkpoint"):
        checkpoint.restore(tmp_path / "nothing")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "foreign", {"kernel": jnp.ones(3)})
    with pytest.raises(ValueError, match="is not a checkpoint of adalora_jax"):
        checkpoint.restore(tmp_path / "foreign")
    with pytest.raises(ValueError, match="`: exists; save under a new name"):
        checkpoint.save(tmp_path / "foreign", *trained, CONFIG)
    with pytest.raises(ValueError, match="holds 0 AllocatorStates"):
        checkpoint.save(tmp_path / "plain", trained[0], optax.adam(0.1).init(trained[0]), CONFIG)


def forge(saved, change):
    about = json.loads((saved / "adalora/metadata").read_text())
    change(about)
    about["digest"] = checkpoint._digest(about)  # as a forger would
    (saved / "adalora/metadata").write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(format="adalora_jax/9"), "has the format 'adalora_jax/9'"),
        (lambda a: a.pop("arrays"), "its metadata in 'adalora' is not as saved"),
        (lambda a: a["arrays"].update({"adapters/down/p": [[-1], "float32", 0]}), "not as saved"),
        (lambda a: a["arrays"].update({"adapters/down/p": [[1], "object", 0]}), "not as saved"),
        (lambda a: a["arrays"].update({"x": [[10**9, 10**6], "float32", 0]}), "declares 4000000"),
        (lambda a: a["arrays"]["adapters/down/p"].__setitem__(2, 7), "adapters/down/p changed"),
        (lambda a: a["config"].update(init_r=0), "`init_r=0`: must be an integer"),
        (lambda a: a["config"].update(extra=1), r"unknown here \(extra\)"),
        (lambda a: a.update(keys={"nothing": "fry"}), "not as saved"),
        (lambda a: a.update(keys={"adapters/down/p": "nonsense"}), "not as saved"),
        (lambda a: a.update(keys=["adapters/down/p"]), "not as saved"),
        (lambda a: a.update(allocator="opt_state/elsewhere"), "not as saved"),
        (lambda a: a.update(step="3"), "not as saved"),
        (lambda a: a.update(config=[]), "not as saved"),
        (lambda a: a["config"].update(rank_overrides=[[1]]), "rank_overrides="),
        (lambda a: a.update(keys={"adapters/down/p": "threefry2x32"}), "not as saved"),
    ],
)
def test_forged_description_raises(saved, change, message):
    forge(saved, change)
    with pytest.raises(ValueError, match=message):
        checkpoint.restore(saved)


@pytest.mark.parametrize(
    "change",
    [lambda a: a.update(step=a["step"] + 1), lambda a: a["config"].update(lora_alpha=3)],
)
def test_changed_step_or_config_is_detected(saved, change):
    about = json.loads((saved / "adalora/metadata").read_text())
    change(about)
    (saved / "adalora/metadata").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="not as saved"):
        checkpoint.restore(saved)


@pytest.mark.slow
def test_corrupt_file_is_detected_or_harmless(saved, tmp_path):
    script = Path(__file__).parent / "damaged_checkpoints.py"
    result = subprocess.run(
        [sys.executable, str(script), str(saved), str(tmp_path)], stdout=subprocess.PIPE, check=True
    )
    outcomes = json.loads(result.stdout.splitlines()[-1])
    assert len(outcomes) >= 4 * 6
    for name, outcome in outcomes:
        assert outcome == "same" or outcome[0] == "ValueError", (name, outcome)
    noticed = {name for name, outcome in outcomes if outcome != "same"}
    assert any(name.startswith("adalora/") for name in noticed)
    assert any(name.startswith("state/") for name in noticed)


def test_config_functions_must_be_passed_to_restore(tmp_path, trained):
    config = CONFIG.replace(budget_schedule=lambda step, config, n, initial: initial)
    checkpoint.save(tmp_path / "c", *trained, config)
    with pytest.raises(ValueError, match=r"with functions .*: budget_schedule \(.*<lambda>\)"):
        checkpoint.restore(tmp_path / "c", optimizer())
    bare = checkpoint.restore(tmp_path / "c")
    assert_same_bits(bare.adapters, trained[0])
    assert list(bare.config.missing_functions()) == ["budget_schedule"]
    assert checkpoint.restore(tmp_path / "c", config=config).config is config


def test_unwritable_path_error_names_the_path(trained, tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "saved"
    with pytest.raises(OSError, match=f"`path='{path}'`: cannot be written: .*; name a folder"):
        checkpoint.save(path, *trained, CONFIG)


def test_config_of_another_run_raises(tmp_path, trained):
    with pytest.raises(ValueError, match=r"another config: lora_alpha=.* instead of 3"):
        checkpoint.save(tmp_path / "other", *trained, CONFIG.replace(lora_alpha=3))
    checkpoint.save(tmp_path / "own", *trained, CONFIG)
    inner = adalora.adalora(optax.adam(0.02), CONFIG.replace(total_step=50))
    longer = optax.chain(optax.clip_by_global_norm(1.0), inner)
    with pytest.raises(ValueError, match="total_step=50 instead of"):
        checkpoint.restore(tmp_path / "own", target=(trained[0], longer.init(trained[0])))
    with pytest.raises(ValueError, match="total_step=50 instead of"):
        checkpoint.restore(tmp_path / "own", longer)


def test_empty_path_raises(trained):
    for call in (lambda: checkpoint.save("", *trained, CONFIG), lambda: checkpoint.restore("")):
        with pytest.raises(ValueError, match="`path=''`: is empty"):
            call()


def test_adapters_of_another_run_are_not_saved(tmp_path, trained):
    adapters, opt_state = trained
    short = fresh(CONFIG.replace(init_r=3))
    others = [
        *(None, {}, {"params": {"head": jnp.ones(3)}}, {"down": adapters["down"]}, short),
        {f"other/{path}": adapter for path, adapter in adapters.items()},
    ]
    for other in others:
        with pytest.raises(ValueError, match=r"`opt_state`: has masks for .*; pass the state"):
            checkpoint.save(tmp_path / "c", other, opt_state, CONFIG)
    assert not list(tmp_path.iterdir())
    checkpoint.save_args(adapters | {"head": jnp.ones(3)}, opt_state, CONFIG)  # a larger tree


@pytest.mark.parametrize("step", [-1, 1.5, "3", True, float("nan"), [1], jnp.ones(2, int)])
def test_step_that_is_no_integer_raises(trained, step):
    with pytest.raises(ValueError, match=r"`step=.*`: must be an integer of at least 0; pass one"):
        checkpoint.save_args(*trained, CONFIG, step=step)


def test_scalar_arrays_are_steps(trained):
    for step in (np.int64(3), jnp.array(3), nnx.Variable(jnp.array(3))):
        assert checkpoint.save_args(*trained, CONFIG, step=step)["adalora"].item["step"] == 3


def test_arguments_of_restore_of_another_kind_raise(tmp_path, trained):
    adapters, opt_state = trained
    for tx in (adapters, opt_state, trained, (), CONFIG):
        with pytest.raises(TypeError, match=r"`tx=.*: is not an optimizer with init and update;"):
            checkpoint.restore(tmp_path, tx)
    for target in (adapters, (adapters,), (), "x", CONFIG, (*trained, CONFIG), (adapters, "x")):
        with pytest.raises(TypeError, match=r"`target=.*: is not a pair of trees of arrays; pass"):
            checkpoint.restore(tmp_path, target=target)
    for config in (CONFIG.to_dict(), {}, 3):
        with pytest.raises(TypeError, match=r"`config=.*`: is not an AdaLoraConfig; pass one"):
            checkpoint.restore(tmp_path, config=config)
        with pytest.raises(TypeError, match=r"`config=.*`: is not an AdaLoraConfig; pass one"):
            checkpoint.save(tmp_path / "c", *trained, config)


def test_random_numbers_beside_adapters_are_saved():
    config = CONFIG.replace(target_modules=["linear"], lora_dropout=0.1)
    base = nnx.Dict(linear=nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    model = adalora.nnx.adapt(base, config, rngs=nnx.Rngs(1))
    opt_state = adalora.adalora(optax.sgd(0.1), config).init(nnx.state(model, nnx.LoRAParam))
    state = nnx.state(model, (nnx.LoRAParam, nnx.RngState))
    checkpoint.save_args(state, opt_state, config)
