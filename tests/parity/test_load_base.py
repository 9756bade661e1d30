"""transformers checkpoints loaded into Flax models: equal logits, and a round trip through PEFT."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support import hf_flax

import adalora_jax as adalora
from adalora_jax import huggingface as files
from parity import hf_models as hf

peft = pytest.importorskip("peft", reason="needs peft: pip install '.[parity]'")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.usefixtures("flax_ranks"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),
]
SIZES = hf_flax.Sizes(hf.VOCABULARY, hf.WIDTH, hf.HIDDEN, hf.LAYERS, hf.HEADS)
IDS = np.arange(14).reshape(2, 7) * 5 % hf.VOCABULARY  # as in hf.logits
NNX_NAMES = files.NameMap((*hf_flax.NNX_LLAMA, *files.hf_names("llama").pairs))
SMALL = {"max_shard_size": "4KB"}


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def saved(model, folder, **options):
    """Save the model; return the folder and its number of weight files."""
    model.save_pretrained(folder, **options)
    return folder, len(list(folder.glob("*.safetensors")))


def in_linen(module, folder, names, **options):
    shapes = jax.eval_shape(module.init, jax.random.key(0), IDS)
    return files.load_base(folder, module, shapes, names=names, **options)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bert_with_classifier_matches_transformers(stacked, dtype, tmp_path):
    torch_model = hf.model("bert").to(getattr(hf.torch, dtype))
    folder, count = saved(torch_model, tmp_path, **SMALL)
    assert count > 2
    model = hf_flax.Bert(SIZES, stacked, classes=2)
    variables = in_linen(model, folder, "bert")
    # In float32 on both sides, so that only loading is compared.
    close(model.apply(variables, IDS), hf.logits(torch_model.float()))


def test_bert_without_head_matches_transformers(tmp_path):
    torch_model = hf.model("bert").bert
    folder, _ = saved(torch_model, tmp_path)
    model = hf_flax.Bert(SIZES)
    hidden, pooled = model.apply(in_linen(model, folder, "bert"), IDS)
    with hf.torch.no_grad():
        theirs = torch_model(hf.torch.tensor(IDS))
    close(hidden, theirs.last_hidden_state.numpy())
    close(pooled, theirs.pooler_output.numpy())
    headless = hf_flax.Bert(SIZES, classes=2)
    with pytest.raises(ValueError, match=r"looked for 'classifier\.weight'"):
        in_linen(headless, folder, "bert")


def test_masked_lm_bert_loads_without_its_head(tmp_path):
    hf.torch.manual_seed(1)
    torch_model = hf.transformers.BertForMaskedLM(hf.model("bert").config).eval()
    folder, _ = saved(torch_model, tmp_path)
    # The masked-language model has no pooler.
    model = hf_flax.Bert(SIZES)
    variables = in_linen(
        model, folder, "bert", allow_unused=r"cls\..*", allow_missing=["pooler/dense/.*"]
    )
    params = {**variables["params"]}
    zeros = lambda leaf: jnp.zeros(leaf.shape, leaf.dtype)
    params["pooler"] = jax.tree.map(zeros, params["pooler"])
    hidden, _ = model.apply({"params": params}, IDS)
    with hf.torch.no_grad():
        close(hidden, torch_model.bert(hf.torch.tensor(IDS)).last_hidden_state.numpy())


def llama(**changes):
    hf.torch.manual_seed(2)
    config = hf.transformers.LlamaConfig(**hf.DECODER | changes, initializer_range=0.2)
    return hf.transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_llama_in_linen_matches_transformers(stacked, tied, tmp_path):
    torch_model = llama(tie_word_embeddings=tied)
    folder, count = saved(torch_model, tmp_path, **SMALL)
    assert count > 2
    for attends in {False, tied}:
        model = hf_flax.Llama(SIZES, stacked, attends)
        variables = in_linen(model, folder, "llama")
        close(model.apply(variables, IDS), hf.logits(torch_model))


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("stacked", [False, True])
def test_llama_and_mistral_in_nnx_match_transformers(stacked, family, tmp_path):
    torch_model = llama()
    if family == "mistral":
        hf.torch.manual_seed(3)
        config = hf.transformers.MistralConfig(**hf.DECODER, initializer_range=0.2)
        torch_model = hf.transformers.MistralForCausalLM(config).eval()
    folder, _ = saved(torch_model, tmp_path, **SMALL)
    shapes = nnx.eval_shape(lambda: hf_flax.NnxLlama(SIZES, stacked))
    model = files.load_base(folder, shapes, names=NNX_NAMES)
    close(model(IDS), hf.logits(torch_model))


def trained(adapted, variables, adapters, config):
    tx = adalora.adalora(optax.adam(0.05), config)
    state = tx.init(adapters)

    @jax.jit
    def step(adapters, state):
        loss = lambda a: jnp.square(adapted.apply(variables, a, IDS) - 1).mean()
        updates, state = tx.update(jax.grad(loss)(adapters), state, adapters)
        return optax.apply_updates(adapters, updates), state

    for _ in range(config.total_step):
        adapters, state = step(adapters, state)
    return adapters, adalora.allocator_state(state)


CASES = {
    "bert": (lambda stacked: hf_flax.Bert(SIZES, stacked, classes=2), ["query", "value", "dense"]),
    "llama": (lambda stacked: hf_flax.Llama(SIZES, stacked), ["q_proj", "v_proj", "down_proj"]),
}


@pytest.mark.parametrize("writer", [files.save_pretrained, files.save_as_lora])
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("family", CASES)
def test_adapter_trained_on_loaded_base_computes_same_in_peft(family, stacked, writer, tmp_path):
    folder, _ = saved(hf.model(family), tmp_path / "base", **SMALL)
    make, targets = CASES[family]
    model = make(stacked)
    variables = in_linen(model, folder, family)
    config = adalora.AdaLoraConfig(
        total_step=10,
        init_r=4,
        target_r=2,
        tfinal=3,
        target_modules=targets,
        exclude_modules=["pooler/dense"] if family == "bert" else None,
    )
    adapted = adalora.linen.adapt(model, config)
    adapters = adapted.init(jax.random.key(0), variables, IDS)
    base = hf.logits(hf.model(family))
    close(adapted.apply(variables, adapters, IDS), base)
    adapters, masks = trained(adapted, variables, adapters, config)
    ranks = adalora.ranks(masks)
    assert sum(ranks.values()) == 2 * len(ranks)
    expected = np.asarray(adapted.apply(variables, adapters, IDS))
    assert np.abs(expected - base).max() > 0.1
    writer(tmp_path / "adapter", adapters, config, masks=masks, names=family)
    theirs = peft.PeftModel.from_pretrained(hf.model(family), tmp_path / "adapter").eval()
    close(hf.logits(theirs), expected)
    files.merge_pretrained(tmp_path / "adapter", folder, tmp_path / "merged")
    merged = in_linen(model, tmp_path / "merged", family)
    close(model.apply(merged, IDS), expected)
