"""Weights of every form read from a checkpoint, with the axes, names and orders of PyTorch."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import hf_numpy
from support.hf_flax import Bert

from adalora_jax import huggingface as peft
from huggingface.checkpoints import IDS, SIZES, Einsum, abstract, close, write

pytestmark = pytest.mark.usefixtures("flax_ranks")


class Kinds(nn.Module):
    """Weights of every supported form."""

    @nn.compact
    def __call__(self, x, image):
        q = Einsum((2, 5, 3), name="q_einsum")("BTD,NDH->BTNH", x)
        k, v = Einsum((2, 1, 5, 3), name="kv_einsum")("BSD,CKDH->CBSKH", x)
        z = Einsum((2, 3, 5), name="attn_vec_einsum")("BTNH,NHD->BTD", q + k + v)
        c = nn.Conv(4, (3, 2), name="conv")(image)
        own = self.param("own", nn.initializers.zeros, (5, 7))
        position = self.param("position", nn.initializers.zeros, (1, 3, 5))
        return z.sum() + c.sum() + (x @ own).sum() + position.sum()


KINDS = {
    "q_proj.weight": (6, 5),
    "k_proj.weight": (3, 5),
    "v_proj.weight": (3, 5),
    "o_proj.weight": (5, 6),
    "conv.weight": (4, 2, 3, 2),
    "conv.bias": (4,),
    "mlp.weight": (7, 5),
    "positions.weight": (3, 5),
    "embeddings.position": (1, 3, 5),
}
NAMES = [
    ("q_einsum", "q_proj"),
    ("kv_einsum[0]", "k_proj"),
    ("kv_einsum[1]", "v_proj"),
    ("attn_vec_einsum", "o_proj"),
    ("conv", "conv"),
    ("own", "mlp"),
    ("position", "embeddings.position"),
]


def test_weight_axes_are_inferred_from_calls_or_equations(tmp_path):
    tensors = hf_numpy.draw(KINDS, 0)
    tensors.pop("positions.weight")
    write(tmp_path, tensors)
    inputs = jnp.ones((1, 4, 5)), jnp.ones((1, 4, 4, 2))
    shapes = jax.eval_shape(Kinds().init, jax.random.key(0), *inputs)
    equations = {"own": "...d,df->...f"}

    def load(*inputs, **options):
        return peft.load_base(tmp_path, Kinds(), shapes, *inputs, names=NAMES, **options)

    params = load(*inputs, equations=equations)["params"]
    want = {
        "q_einsum": tensors["q_proj.weight"].reshape(2, 3, 5).transpose(0, 2, 1),
        "attn_vec_einsum": tensors["o_proj.weight"].T.reshape(2, 3, 5),
    }
    for name, value in want.items():
        np.testing.assert_array_equal(params[name]["w"], value)
    for n, name in enumerate("kv"):
        value = tensors[f"{name}_proj.weight"].reshape(1, 3, 5).transpose(0, 2, 1)
        np.testing.assert_array_equal(params["kv_einsum"]["w"][n], value)
    conv = tensors["conv.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(params["conv"]["kernel"], conv)
    np.testing.assert_array_equal(params["own"], tensors["mlp.weight"].T)
    np.testing.assert_array_equal(params["position"], tensors["embeddings.position"])
    with pytest.raises(
        ValueError, match=r"'attn_vec_einsum/w' .* linen model as \*args, or equations="
    ):
        load(equations={**equations, "q_einsum/w": "BTD,NDH->BTNH"})
    with pytest.raises(ValueError, match="`equations`: 'owm' matches no parameter"):
        load(*inputs, equations={"owm": "...d,df->...f"})
    with pytest.raises(ValueError, match=r"`equations\['own'\]='d->f'`: does not determine"):
        load(*inputs, equations={"own": "d->f"})
    with pytest.raises(ValueError, match=r"'own' of shape \[5, 7\] does not fit 'mlp.weight'"):
        load(*inputs, equations={"own": "...f,df->...d"})


def test_gpt2_conv1d_and_fused_projection_load(tmp_path):
    """Weights are [in, out] in the file, as the model type in the config implies."""

    class Attention(nn.Module):
        @nn.compact
        def __call__(self, x):
            q, k, v = (nn.DenseGeneral((2, 3), name=n)(x) for n in ("query", "key", "value"))
            return nn.DenseGeneral(6, axis=(-2, -1), name="out")(q + k + v)

    class Gpt(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Attention(name="h_0_attn")(x)

    shapes = {"h.0.attn.c_attn.weight": (6, 18), "h.0.attn.c_attn.bias": (18,)}
    shapes |= {"h.0.attn.c_proj.weight": (6, 6), "h.0.attn.c_proj.bias": (6,)}
    tensors = hf_numpy.draw(shapes, 0)
    write(tmp_path, tensors, config={"model_type": "gpt2"})
    fused = {n: f"h.0.attn.c_attn:{k}/3" for k, n in enumerate(("query", "key", "value"))}
    names = {f"h_0_attn/{n}": hf for n, hf in (fused | {"out": "h.0.attn.c_proj"}).items()}
    x = jax.random.normal(jax.random.key(0), (2, 6))
    variables = peft.load_base(tmp_path, Gpt(), abstract(Gpt(), x), names=names)
    y = np.asarray(x) @ tensors["h.0.attn.c_attn.weight"] + tensors["h.0.attn.c_attn.bias"]
    y = sum(np.split(y, 3, axis=-1)) @ tensors["h.0.attn.c_proj.weight"]
    close(Gpt().apply(variables, x), y + tensors["h.0.attn.c_proj.bias"])
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"18 inputs, 2 outputs|18 inputs|not 3 equal parts"):
        peft.load_base(tmp_path, Gpt(), abstract(Gpt(), x), names=names)


def test_legacy_norm_names_load_and_unused_tensors_raise(tmp_path):
    """The first BERT checkpoints have these names."""
    tensors = hf_numpy.bert_tensors(SIZES, prefix="bert.")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for name, value in tensors.items()
    }
    ids = {"bert.embeddings.position_ids": np.arange(32)[None]}
    heads = {"cls.predictions.bias": np.zeros(40, "f4"), "cls.seq_relationship.bias": np.zeros(2)}
    write(tmp_path, {**old, **ids, **heads})
    model = Bert(SIZES)

    def load(**options):
        return peft.load_base(tmp_path, model, abstract(model), names="bert", **options)

    for allowed in (True, r"cls\..*", ["predictions.bias", "cls.seq_relationship.bias"]):
        variables = load(allow_unused=allowed)
    jax.tree.map(close, model.apply(variables, IDS), hf_numpy.bert(tensors, SIZES, IDS, "bert."))
    with pytest.raises(ValueError, match=r"'cls.predictions.bias'.* are not used.*allow_unused="):
        load()
    with pytest.raises(ValueError, match=r"the tensors 'cls.seq_relationship.bias' are not used"):
        load(allow_unused="predictions.bias")
