"""Tiny configurations of linen models: Google DeepMind's gemma and those of Flax's examples."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.public_models import IDS, VOCABULARY, Builds, Case, floats, noisy


def _case(model: Any, *args: Any, **kwargs: Any) -> Case:
    """Return the case of a linen model; ``method`` and ``rngs`` are those of ``module.apply``."""
    keys = {name: jax.random.key(0) for name in ("params", "dropout", "lstm")}
    inputs = {name: value for name, value in kwargs.items() if name != "rngs"}
    variables = model.init(keys, *args, **inputs)
    return Case(model, jax.tree.map(noisy, variables), args, kwargs)


def gemma() -> Builds:
    """Return the models of the package gemma: Gemma 2, 3 and 3n."""
    gm = importlib.import_module("gemma.gm")

    def transformer(attention: dict[str, int], **changes: Any) -> Case:
        kinds = gm.nn.AttentionType
        config = gm.nn.config.TransformerConfig(
            **{
                "num_embed": VOCABULARY,
                "embed_dim": 16,
                "hidden_dim": 24,
                "head_dim": 8,
                "final_logit_softcap": None,
                "use_post_attn_norm": True,
                "use_post_ffw_norm": True,
                "attention_types": [kinds.LOCAL_SLIDING, kinds.GLOBAL],
                "sliding_window_size": 4,
                "transpose_gating_einsum": True,
                **attention,
                **changes,
            }
        )
        return _case(gm.nn.Transformer(config=config, dtype=jnp.float32, tokens="tokens"), IDS)

    def gemma3n() -> Case:
        whole = gm.nn.Gemma3n_E2B().config
        sizes = {"num_embed": VOCABULARY, "embed_dim": 16, "hidden_dim": 24, "num_heads": 4}
        sizes |= {"head_dim": 8, "num_kv_heads": 2, "sliding_window_size": 4}
        types = whole.attention_types[3:5]
        config = dataclasses.replace(whole, **sizes, attention_types=types, vision_encoder=None)
        return _case(gm.nn.Gemma3n_E2B(config=config, dtype=jnp.float32, tokens="tokens"), IDS)

    shared, single = ({"num_heads": heads, "num_kv_heads": heads // 2} for heads in (4, 2))
    return {
        "Gemma 2": lambda: transformer(shared, final_logit_softcap=30.0),
        "Gemma 3": lambda: transformer(shared, use_qk_norm=True),
        "Gemma 3, one key": lambda: transformer(single, use_qk_norm=True),
        "Gemma 3, all in one": lambda: transformer({"num_heads": 2, "num_kv_heads": 2}),
        "Gemma 3n": gemma3n,
    }


def flax() -> Builds:
    """Return the linen models of Flax's examples."""

    def of(name: str) -> Any:
        return importlib.import_module(f"examples.{name}.models")

    sizes = {"vocab_size": VOCABULARY, "output_vocab_size": VOCABULARY, "emb_dim": 16}
    sizes |= {"num_heads": 2, "num_layers": 2, "qkv_dim": 16, "mlp_dim": 24, "max_len": 16}
    targets = IDS[:, :4]

    def lm1b(**options: Any) -> Case:
        module = of("lm1b")
        config = module.TransformerConfig(**sizes, deterministic=True, **options)
        return _case(module.TransformerLM(config), IDS)

    def wmt(**options: Any) -> Case:
        module = of("wmt")
        config = module.TransformerConfig(**sizes, deterministic=True, **options)
        return _case(module.Transformer(config), IDS, targets)

    def nlp_seq() -> Case:
        module = of("nlp_seq")
        return _case(module.Transformer(module.TransformerConfig(**sizes)), inputs=IDS, train=False)

    def seq2seq(teacher_force: bool) -> Case:
        module = of("seq2seq")
        hot = np.eye(7, dtype="f4")[IDS % 7]
        rngs = {"lstm": jax.random.key(0)}
        return _case(module.Seq2seq(teacher_force, 12, 7), hot, hot[:, :4], rngs=rngs)

    def sst2() -> Case:
        module = of("sst2")
        model = module.TextClassifier(12, 16, VOCABULARY, 1, 0.0, 0.0)
        return _case(model, IDS, np.array([6, 4]), deterministic=True)

    def ppo() -> Case:
        return _case(of("ppo").ActorCritic(4), 255 * abs(floats(2, 36, 36, 4)))

    def vae() -> Case:
        return _case(of("vae").VAE(4), floats(2, 784), jax.random.key(2))

    def resnet(block: str) -> Case:
        module = of("imagenet")
        model = module.ResNet([1, 1], getattr(module, block), 5, 4)
        return _case(model, floats(2, 16, 16, 3), train=False)

    def ogbg(name: str) -> Case:
        jraph = importlib.import_module("jraph")
        graph = jraph.GraphsTuple(
            nodes=floats(5, 3),
            edges=floats(6, 2),
            senders=np.array([0, 1, 2, 3, 4, 0]),
            receivers=np.array([1, 2, 0, 4, 3, 2]),
            globals=floats(2, 4),
            n_node=np.array([3, 2]),
            n_edge=np.array([4, 2]),
        )
        pooled = {"pooling_fn": jraph.segment_mean} if name == "GraphConvNet" else {}
        return _case(getattr(of("ogbg_molpcba"), name)(8, 1, 2, 5, **pooled), graph)

    return {
        "lm1b": lm1b,
        "lm1b, tied": lambda: lm1b(logits_via_embedding=True),
        "wmt": wmt,
        "wmt, tied": lambda: wmt(share_embeddings=True, logits_via_embedding=True),
        "nlp_seq": nlp_seq,
        "seq2seq, teacher forcing": lambda: seq2seq(True),
        "seq2seq": lambda: seq2seq(False),
        "sst2": sst2,
        "ppo": ppo,
        "vae": vae,
        "imagenet, ResNet block": functools.partial(resnet, "ResNetBlock"),
        "imagenet, bottleneck": functools.partial(resnet, "BottleneckResNetBlock"),
        "ogbg_molpcba, GraphNet": lambda: ogbg("GraphNet"),
        "ogbg_molpcba, GraphConvNet": lambda: ogbg("GraphConvNet"),
    }
