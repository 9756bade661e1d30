"""Adapters saved here and loaded by PEFT into transformers models; the logits are compared with
those of the plain model, to whose weights every increment was added by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adalora_jax as adalora
from adalora_jax import huggingface as files
from adalora_jax._src.core import evaluation
from parity import hf_models as hf

peft = pytest.importorskip("peft", reason="needs peft: pip install '.[parity]'")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),
]

CONFIG = adalora.AdaLoraConfig(
    total_step=20, init_r=4, target_r=2, lora_alpha=6, init_lora_weights=False
)
WRITERS = {"adalora": files.save_pretrained, "lora": files.save_as_lora}


def loaded(family, folder):
    return peft.PeftModel.from_pretrained(hf.model(family), folder).eval()


def small(adapters):
    """Scale increments so that they move the logits, but not so far that rounding shows."""
    return {path: a._replace(lam=0.1 * a.lam) for path, a in adapters.items()}


def close(actual, expected):
    """Compare up to float32 rounding and PEFT's ``+ 1e-5`` in its scale, over a few layers."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=5e-5 * np.abs(expected).max())


@pytest.fixture
def example(request):
    family, layout = hf.LAYOUTS[request.param]
    adapters, masks = hf.adapters(layout, hf.model(family), CONFIG)
    return family, layout, small(adapters), masks


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("example", hf.LAYOUTS, indirect=True)
def test_logits_in_peft_match_dense_increments(example, writer, tmp_path):
    family, layout, adapters, masks = example
    WRITERS[writer](tmp_path, adapters, CONFIG, masks=masks, names=family)
    masked = evaluation.apply_masks(adapters, masks)
    expected = hf.logits(hf.with_increments(family, layout, masked, CONFIG))
    actual = hf.logits(loaded(family, tmp_path))
    base = hf.logits(hf.model(family))
    assert np.abs(expected - base).max() > 1e-2, "the adapter does nothing"
    close(actual, expected)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("example", hf.LAYOUTS, indirect=True)
def test_saved_adapters_load_with_same_increments(example, writer, tmp_path):
    """AdaLoRA files keep active rows bit for bit; LoRA files have λ in the other factors."""
    family, _, adapters, masks = example
    WRITERS[writer](tmp_path, adapters, CONFIG, masks=masks, names=family)
    read = files.load_pretrained(tmp_path, names=family, like=adapters)
    masked = evaluation.apply_masks(adapters, masks)
    for path, adapter in masked.items():
        want = adalora.delta_weight(adapter)
        got = adalora.delta_weight(read.adapters[path])
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
        if writer == "adalora":
            for index in np.ndindex(adapter.lam.shape[:-1]):
                active, kept = np.asarray(masks[path][index]), read.masks[path][index]
                for before, after in zip(adapter, read.adapters[path]):
                    np.testing.assert_array_equal(
                        np.asarray(before)[index][active], np.asarray(after)[index][kept]
                    )


def test_lora_export_has_ranks_of_masks(tmp_path):
    family, layout = hf.LAYOUTS["bert, stacked"]
    adapters, masks = hf.adapters(layout, hf.model(family), CONFIG)
    files.save_as_lora(tmp_path, adapters, CONFIG, masks=masks, names=family)
    found = {}
    for name, module in loaded(family, tmp_path).base_model.model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            found[name] = module.r["default"], module.scaling["default"]
            assert module.lora_A["default"].weight.shape[0] == found[name][0]
    kept = adalora.ranks(masks)
    names = {
        f"{path}[{piece.index[0]}]": piece.module
        for path, (_, pieces) in layout.items()
        for piece in pieces
    }
    assert 0 in kept.values()
    assert found == {names[row]: (rank, 1.0) for row, rank in kept.items() if rank}


def test_per_layer_scales_are_kept(tmp_path):
    config = CONFIG.replace(
        rank_overrides={"query": {"alpha": 30, "init_r": 6}, "key": {"alpha": -1}}
    )
    family, layout = hf.LAYOUTS["bert"]
    adapters, masks = hf.adapters(layout, hf.model(family), config)
    adapters = small(adapters)
    expected = hf.with_increments(family, layout, evaluation.apply_masks(adapters, masks), config)
    for name, write in WRITERS.items():
        write(tmp_path / name, adapters, config, masks=masks, names=family)
        actual = hf.logits(loaded(family, tmp_path / name))
        close(actual, hf.logits(expected))


@pytest.mark.parametrize("alpha", [0, -2])
def test_nonpositive_alpha_means_scale_of_one(alpha, tmp_path):
    config = CONFIG.replace(lora_alpha=alpha)
    family, layout = hf.LAYOUTS["llama"]
    adapters, masks = hf.adapters(layout, hf.model(family), config)
    adapters = small(adapters)
    files.save_pretrained(tmp_path, adapters, config, masks=masks, names=family)
    expected = hf.with_increments(family, layout, evaluation.apply_masks(adapters, masks), config)
    actual = hf.logits(loaded(family, tmp_path))
    close(actual, hf.logits(expected))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes_are_saved_unchanged(dtype, tmp_path):
    config = CONFIG.replace(param_dtype=dtype)
    family, layout = hf.LAYOUTS["bert"]
    adapters, masks = hf.adapters(layout, hf.model(family), config)
    files.save_pretrained(tmp_path, adapters, config, masks=masks, names=family)
    read = files.load_pretrained(tmp_path, names=family)
    assert read.config.param_dtype == dtype
    torch_side = loaded(family, tmp_path).base_model.model
    for path, (_, (piece,)) in layout.items():
        mine = np.asarray(read.adapters[path].q, np.float32)
        its = torch_side.get_submodule(piece.module).lora_A["default"].detach().float().numpy()
        np.testing.assert_array_equal(mine, its)


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_trained_classifier_is_saved_with_adapters(task_type, tmp_path):
    family, layout = hf.LAYOUTS["bert"]
    adapters, masks = hf.adapters(layout, hf.model(family), CONFIG)
    kernel = jax.random.normal(jax.random.key(5), (hf.WIDTH, 2))
    head = {"kernel": kernel, "bias": jax.numpy.array([0.5, -1.0])}
    trained = {**small(adapters), "classifier": head}
    expected = hf.with_increments(
        family, layout, evaluation.apply_masks(small(adapters), masks), CONFIG
    )
    expected.classifier.weight.data = hf.torch.tensor(np.asarray(kernel).T)
    expected.classifier.bias.data = hf.torch.tensor(np.asarray(head["bias"]))
    for name, write in WRITERS.items():
        folder = tmp_path / name
        write(folder, trained, CONFIG, masks=masks, names=family, task_type=task_type)
        actual = hf.logits(loaded(family, folder))
        close(actual, hf.logits(expected))
        read = files.load_pretrained(folder, names=family)
        np.testing.assert_array_equal(read.adapters["classifier"]["kernel"], kernel)
        assert read.config.modules_to_save == ("classifier",)


def test_convolution_kernel_is_transposed(tmp_path):
    """The kernel of ViT's patches is [4, 4, 3, out] in Flax and [out, 3, 4, 4] in PyTorch."""
    module = "vit.embeddings.patch_embeddings.projection"
    path = "patches"
    shape = (4, 4, 3, hf.WIDTH)
    layout = adalora.Layout("kernel", (0, 1, 2), (3,), kind="conv", shape=shape)
    adapter = adalora.init_adapter(jax.random.key(3), 4 * 4 * 3, hf.WIDTH, CONFIG)
    adapter = adapter._replace(layout=layout)
    dense = np.asarray(adalora.delta_weight(adapter))
    expected = hf.model("vit")
    delta = dense.reshape(4, 4, 3, hf.WIDTH).transpose(3, 2, 0, 1)
    expected.get_submodule(module).weight.data += hf.torch.tensor(delta)
    options = {"names": [(path, module)]}
    for name, write in WRITERS.items():
        write(tmp_path / name, {path: adapter}, CONFIG, **options)
        actual = hf.logits(loaded("vit", tmp_path / name))
        close(actual, hf.logits(expected))
        read = files.load_pretrained(tmp_path / name, like={path: adapter}, **options)
        got = adalora.delta_weight(read.adapters[path])
        np.testing.assert_allclose(got, dense, rtol=1e-5, atol=1e-6)


def test_task_type_requires_classifier_here_and_in_peft(tmp_path):
    family, layout = hf.LAYOUTS["bert"]
    adapters, _ = hf.adapters(layout, hf.model(family), CONFIG)
    with pytest.raises(ValueError, match="task_type='SEQ_CLS'"):
        files.save_pretrained(tmp_path, adapters, CONFIG, names=family, task_type="SEQ_CLS")
    files.save_pretrained(tmp_path, adapters, CONFIG, names=family)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"task_type": null', '"task_type": "SEQ_CLS"'))
    with pytest.raises(KeyError, match="classifier"):
        loaded(family, tmp_path)


class Heads(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.DenseGeneral((2, 3), name="query")(x)
        return x + nn.DenseGeneral(6, axis=(-2, -1), name="out")(jnp.tanh(y))


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        step = nn.scan(
            lambda module, carry, _: (module(carry), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = step(Heads(name="layers"), x, None)
        return nn.Dense(2, name="head")(x)


class TorchBlock(hf.torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.query = hf.torch.nn.Linear(6, 6)
        self.out = hf.torch.nn.Linear(6, 6)

    def forward(self, x):
        return x + self.out(hf.torch.tanh(self.query(x)))


class TorchModel(hf.torch.nn.Module):
    def __init__(self, params):
        super().__init__()
        self.blocks = hf.torch.nn.ModuleList(TorchBlock() for _ in range(3))
        self.head = hf.torch.nn.Linear(6, 2)
        pairs = [(self.head, params["head"]["kernel"], params["head"]["bias"])]
        for i, block in enumerate(self.blocks):
            for name in ("query", "out"):
                layer = params["layers"][name]
                pairs.append((getattr(block, name), layer["kernel"][i], layer["bias"][i]))
        for linear, kernel, bias in pairs:
            width = linear.in_features
            linear.weight.data = hf.torch.tensor(np.asarray(kernel).reshape(width, -1).T.copy())
            linear.bias.data = hf.torch.tensor(np.asarray(bias).reshape(-1))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("writer", WRITERS)
def test_trained_and_pruned_flax_model_computes_same_in_torch(writer, tmp_path):
    """The model has stacked layers with head axes, and a trained head."""
    config = adalora.AdaLoraConfig(
        total_step=12,
        init_r=3,
        target_r=1,
        tfinal=4,
        target_modules=["query", "out"],
        modules_to_save=["head"],
    )
    x = jax.random.normal(jax.random.key(0), (4, 6))
    model = Scanned()
    variables = model.init(jax.random.key(1), x)
    adapted = adalora.linen.adapt(model, config)
    trained = adapted.init(jax.random.key(2), variables, x)
    tx = adalora.adalora(optax.adam(0.1), config)
    state = tx.init(trained)

    @jax.jit
    def step(trained, state):
        loss = lambda a: jnp.square(adapted.apply(variables, a, x) - 1).mean()
        updates, state = tx.update(jax.grad(loss)(trained), state, trained)
        return optax.apply_updates(trained, updates), state

    for _ in range(config.total_step):
        trained, state = step(trained, state)
    masks = adalora.allocator_state(state)
    assert len(set(adalora.ranks(masks).values())) > 1
    names = [("layers/{part}[{i}]", "blocks.{i}.{part}"), ("head", "head")]
    WRITERS[writer](tmp_path, trained, config, masks=masks, names=names)
    expected = adapted.apply(variables, trained, x)
    assert np.abs(expected - model.apply(variables, x)).max() > 0.1
    torch_model = peft.PeftModel.from_pretrained(TorchModel(variables["params"]), tmp_path).eval()
    with hf.torch.no_grad():
        actual = torch_model(hf.torch.tensor(np.asarray(x))).numpy()
    close(actual, np.asarray(expected))
