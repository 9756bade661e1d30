"""Merged checkpoints whose head was tied to the embedding: untied where the two differ."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from adalora_jax import huggingface as peft
from huggingface.bases import ADAPTERS, CONFIG, WEIGHTS, read_all, refused

RNG = np.random.default_rng(1)

TIED = {"model_type": "llama", "tie_word_embeddings": True}
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SQUARE = RNG.normal(size=(6, 6)).astype(np.float32)
TABLE, OTHER = (RNG.normal(size=(11, 6)).astype(np.float32) for _ in range(2))
A, B = (RNG.normal(size=shape).astype(np.float32) for shape in ((2, 6), (11, 2)))


def tied_base(folder, config=TIED, **tensors):
    folder.mkdir()
    query = {"model.layers.0.self_attn.q_proj.weight": SQUARE}
    tensors = {name.replace("__", "."): value for name, value in tensors.items()}
    save_file(query | (tensors or {EMBED: TABLE}), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def lora(folder, **tensors):
    """Write a LoRA adapter of q_proj with saved tensors, whose names have ``__`` for dots."""
    folder.mkdir()
    query = "base_model.model.model.layers.0.self_attn.q_proj"
    weights = {f"{query}.lora_A.weight": A, f"{query}.lora_B.weight": np.ones((6, 2), np.float32)}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q"]}))
    saved = {f"base_model.model.{n.replace('__', '.')}": v for n, v in tensors.items()}
    save_file(weights | saved, folder / "adapter_model.safetensors")
    return folder


def merged(tmp_path, adapter, base, **options):
    """Merge; return the embedding, the head and the config of the result."""
    peft.merge_pretrained(adapter, base, tmp_path / "out", **options)
    tensors = read_all(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    return tensors.get(EMBED), tensors.get(HEAD), config


def test_trained_head_of_tied_base_is_untied(tmp_path):
    base = tied_base(tmp_path / "base")
    embed, head, config = merged(tmp_path, lora(tmp_path / "lora", lm_head__weight=OTHER), base)
    np.testing.assert_array_equal(embed, TABLE)
    np.testing.assert_array_equal(head, OTHER)
    assert config == TIED | {"tie_word_embeddings": False}


def test_trained_embedding_of_tied_base_leaves_head_unchanged(tmp_path):
    base = tied_base(tmp_path / "base")
    adapter = lora(tmp_path / "lora", model__embed_tokens__weight=OTHER)
    embed, head, config = merged(tmp_path, adapter, base)
    np.testing.assert_array_equal(embed, OTHER)
    np.testing.assert_array_equal(head, TABLE)
    assert config["tie_word_embeddings"] is False


@pytest.mark.parametrize("stored", [False, True])
def test_tied_option_updates_head_with_embedding(stored, tmp_path):
    tensors = {EMBED: TABLE} | ({HEAD: TABLE} if stored else {})
    base = tied_base(tmp_path / "base", **tensors)
    adapter = lora(tmp_path / "lora", model__embed_tokens__weight=OTHER)
    embed, head, config = merged(tmp_path, adapter, base, tied=True)
    np.testing.assert_array_equal(embed, OTHER)
    if stored:
        np.testing.assert_array_equal(head, OTHER)
    else:
        assert head is None
    assert config == TIED


def test_head_equal_to_embedding_stays_tied(tmp_path):
    both = {"model__embed_tokens__weight": OTHER, "lm_head__weight": OTHER.copy()}
    base = tied_base(tmp_path / "base")
    embed, head, config = merged(tmp_path, lora(tmp_path / "lora", **both), base)
    np.testing.assert_array_equal(embed, OTHER)
    np.testing.assert_array_equal(head, OTHER)
    assert config == TIED
    peft.merge_pretrained(lora(tmp_path / "plain"), base, tmp_path / "plain out")
    assert json.loads((tmp_path / "plain out" / "config.json").read_text()) == TIED


def test_increment_of_tied_head_is_added_to_copy_of_embedding(tmp_path):
    base = tied_base(tmp_path / "base")
    adapter = lora(tmp_path / "lora", lm_head__lora_A__weight=A, lm_head__lora_B__weight=B)
    embed, head, config = merged(tmp_path, adapter, base)
    np.testing.assert_array_equal(embed, TABLE)
    np.testing.assert_allclose(head, TABLE + B @ A, rtol=1e-5, atol=1e-6)
    assert config["tie_word_embeddings"] is False


@pytest.mark.parametrize("what", ["embedding", "head"])
def test_tied_base_that_stores_both_tensors_is_untied(what, tmp_path):
    base = tied_base(tmp_path / "base", **{EMBED: TABLE, HEAD: TABLE})
    name = "model__embed_tokens__weight" if what == "embedding" else "lm_head__weight"
    embed, head, config = merged(tmp_path, lora(tmp_path / "lora", **{name: OTHER}), base)
    np.testing.assert_array_equal(embed, OTHER if what == "embedding" else TABLE)
    np.testing.assert_array_equal(head, OTHER if what == "head" else TABLE)
    assert config["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("embedding", "head"),
    [
        ("model.language_model.embed_tokens.weight", "lm_head.weight"),
        ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
        ("transformer.wte.weight", "lm_head.weight"),
    ],
)
@pytest.mark.parametrize("inner", [{}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("outer", [{}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("trained", ["embedding", "head"])
def test_nested_configs_and_names_are_untied(embedding, head, inner, outer, trained, tmp_path):
    config = {"architectures": ["XForConditionalGeneration"], "text_config": {"r": 1, **inner}}
    base = tied_base(tmp_path / "base", config | outer, **{embedding: TABLE})
    name = (embedding if trained == "embedding" else head).replace(".", "__")
    peft.merge_pretrained(lora(tmp_path / "lora", **{name: OTHER}), base, tmp_path / "out")
    tensors = read_all(tmp_path / "out")
    np.testing.assert_array_equal(tensors[embedding], OTHER if trained == "embedding" else TABLE)
    np.testing.assert_array_equal(tensors[head], OTHER if trained == "head" else TABLE)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["tie_word_embeddings"] is written["text_config"]["tie_word_embeddings"] is False
    assert written["text_config"]["r"] == 1


def test_head_with_unknown_name_is_recognised_by_shape(tmp_path):
    config = {"model_type": "whisper", "tie_word_embeddings": True}
    base = tied_base(tmp_path / "base", config)
    *_, config = merged(tmp_path, lora(tmp_path / "lora", proj_out__weight=OTHER), base)
    assert config["tie_word_embeddings"] is False


def test_untied_base_and_encoder_keep_config(tmp_path):
    apart = {"tie_word_embeddings": False}
    base = tied_base(tmp_path / "base", apart, **{EMBED: TABLE, HEAD: OTHER})
    saved = {"model__embed_tokens__weight": OTHER, "lm_head__weight": TABLE}
    embed, head, config = merged(tmp_path, lora(tmp_path / "lora", **saved), base)
    np.testing.assert_array_equal(embed, OTHER)
    np.testing.assert_array_equal(head, TABLE)
    assert config == apart
    encoder = tied_base(tmp_path / "encoder", {"architectures": ["BertModel"]})
    adapter = lora(tmp_path / "other", model__embed_tokens__weight=OTHER)
    peft.merge_pretrained(adapter, encoder, tmp_path / "encoded")
    assert HEAD not in read_all(tmp_path / "encoded")


def test_ambiguous_tied_head_raises(tmp_path):
    differing = tied_base(tmp_path / "differing", **{EMBED: TABLE, HEAD: OTHER})
    saved = lora(tmp_path / "saved", model__embed_tokens__weight=SQUARE[:1].repeat(11, 0))
    refused(ValueError, "version of transformers decides", tmp_path, differing, saved)
    seq2seq = tied_base(tmp_path / "seq2seq", TIED | {"is_encoder_decoder": True})
    refused(ValueError, "the name of the head is not known.*tied=True", tmp_path, seq2seq, saved)
    several = tied_base(tmp_path / "several", **{EMBED: TABLE, "shared.weight": TABLE})
    refused(ValueError, "ties .*shared.weight.*store the head", tmp_path, several, saved)
    bare = tied_base(tmp_path / "bare", TIED, **{"embed_tokens.weight": TABLE})
    (bare / "model.safetensors").unlink()
    save_file({"embed_tokens.weight": TABLE, **WEIGHTS}, bare / "model.safetensors")
    head = {"lm_head": {"kernel": jnp.asarray(OTHER.T)}, "model/up": ADAPTERS["model/up"]}
    options = {"masks": None}
    refused(ValueError, "which has no prefix", tmp_path, bare, head, **options)
    base = tied_base(tmp_path / "base", **{EMBED: TABLE, **WEIGHTS})
    embed = {"model/embed_tokens": {"embedding": jnp.asarray(OTHER)}, "model/up": head["model/up"]}
    refused(ValueError, "`tied=None`: .*tied=True.*tied=False", tmp_path, base, embed, **options)
    for tied in (True, False):
        out = tmp_path / str(tied)
        peft.merge_pretrained(embed, base, out, config=CONFIG, tied=tied)
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is tied
        assert (HEAD in read_all(out)) is not tied
    peft.merge_pretrained(embed | {"lm_head": head["lm_head"]}, base, tmp_path / "d", config=CONFIG)
    np.testing.assert_array_equal(read_all(tmp_path / "d")[HEAD], OTHER)
