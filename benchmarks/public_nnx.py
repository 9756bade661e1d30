"""Tiny configurations of NNX models: Tunix's, bonsai's and those of Flax's examples."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import adalora_jax as adalora
from benchmarks.public_models import IDS, VOCABULARY, Builds, Case, direct, floats, noisy


def _case(
    make: Callable[[nnx.Rngs], Any],
    *args: Any,
    call: Callable[..., Any] = direct,
    layers: dict[type, adalora.Layout] | None = None,
    mesh: jax.sharding.Mesh | None = None,
    **kwargs: Any,
) -> Case:
    """Return the case of an NNX model in evaluation mode."""
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        model = make(nnx.Rngs(0))
        model.eval()
        for _, variable in nnx.iter_graph(model):
            if isinstance(variable, nnx.Param):
                variable.set_value(noisy(variable.get_value()))
    return Case(model, None, args, kwargs, call, layers, mesh)


def tunix() -> Builds:
    """Return Tunix's models."""

    def decode(model: Any, ids: np.ndarray) -> Any:
        batch, length = ids.shape
        positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (batch, length, length))
        return model(ids, positions, None, mask)[0]

    sizes = {"num_layers": 2, "embed_dim": 16, "hidden_dim": 24, "num_heads": 4, "head_dim": 8}
    sizes["num_kv_heads"] = 2
    llama = {**sizes, "vocab_size": VOCABULARY, "rope_theta": 10_000, "norm_eps": 1e-5}
    gemmas = {**sizes, "num_embed": VOCABULARY, "sliding_window_size": 4}
    gemma2 = {**gemmas, "use_post_attn_norm": True, "use_post_ffw_norm": True}
    gemma2["final_logit_softcap"] = 30.0

    def build(family: str, name: str, **values: Any) -> Case:
        module = importlib.import_module(f"tunix.models.{family}.model")
        if family in ("gemma", "gemma4"):
            kinds = module.AttentionType
            pattern = "attention_types" if family == "gemma" else "attention_pattern"
            values[pattern] = (kinds.LOCAL_SLIDING, kinds.GLOBAL)
        config = module.ModelConfig(**values)
        return _case(lambda rngs: getattr(module, name)(config, rngs=rngs), IDS, call=decode)

    moe = {"num_experts": 4, "num_experts_per_tok": 2}
    moe4 = {**moe, "enable_moe": True, "expert_dim": 12, "moe_dense_hidden_dim": 24}
    found: dict[str, tuple[str, str, dict[str, Any]]] = {
        "Llama 3": ("llama3", "Llama3", llama),
        "Qwen 2": ("qwen2", "Qwen2", llama),
        "Qwen 3": ("qwen3", "Qwen3", llama),
        "Qwen 3, tied": ("qwen3", "Qwen3", {**llama, "use_tied_embedding": True}),
        "Qwen 3, mixture of experts": ("qwen3", "Qwen3", {**llama, **moe}),
        "Gemma": (
            "gemma",
            "Gemma",
            {**gemma2, "use_post_attn_norm": False, "use_post_ffw_norm": False},
        ),
        "Gemma 2": ("gemma", "Gemma", gemma2),
        "Gemma 3": ("gemma3", "Gemma3", {**gemmas, "param_dtype": jnp.float32}),
        "Gemma 4": ("gemma4", "Gemma4", {**gemmas, "global_key_size": 8}),
        "Gemma 4, inputs per layer": (
            "gemma4",
            "Gemma4",
            {**gemmas, "global_key_size": 8, "per_layer_input_dim": 4},
        ),
        "Gemma 4, mixture of experts": (
            "gemma4",
            "Gemma4",
            {**gemmas, "global_key_size": 8, **moe4},
        ),
    }
    return {
        name: lambda family=family, cls=cls, values=values: build(family, cls, **values)
        for name, (family, cls, values) in found.items()
    }


def bonsai() -> Builds:
    """Return bonsai's models."""

    def of(name: str) -> Any:
        return importlib.import_module(f"bonsai.models.{name}.modeling")

    image, images = floats(2, 8, 8, 3), floats(2, 32, 32, 3)

    def convnext() -> Case:
        module = of("convnext")
        config = module.ModelConfig((1, 1, 1, 1), (8, 8, 12, 16), 0.0, 5)
        return _case(lambda rngs: module.ConvNeXt(config, rngs=rngs), images, rngs=None)

    def densenet() -> Case:
        module = of("densenet121")
        config = module.ModelConfig(5, [1, 1, 1, 1], 4)
        return _case(lambda rngs: module.DenseNet(config, rngs=rngs), images)

    def dinov3(**options: Any) -> Case:
        module = of("dinov3")
        config = module.ModelConfig((4, 4), 16, 24, 2, 2, image_size=8, **options)
        x = np.moveaxis(image, -1, 1)
        return _case(lambda rngs: module.Dinov3ViTModel(config, rngs=rngs), x)

    def efficientnet() -> Case:
        module = of("efficientnet")
        blocks = [module.BlockConfig(32, 16, 3, 1, 1, 1, 0.25, 1)]
        blocks += [module.BlockConfig(16, 24, 3, 1, 2, 2, 0.25, 1)]
        config = module.ModelConfig(
            *(0.25, 1.0, 8, 0.0, 1, 0.99, 1e-5), module.BlockConfigs(blocks), 5
        )
        return _case(lambda rngs: module.EfficientNet(config, rngs=rngs), image)

    def gemma3() -> Case:
        module = of("gemma3")
        vision = module.VisionConfig(0.0, 16, 8, 24, 1e-6, 2, 3, 1, 4, False)
        text = module.TextConfig(
            *(False, 0.0, 8, 16, 24, module._set_attention_modes(2, 2), 64, 4, 2, 2),
            *(1e-6, 8.0, 1e6, 1.0, 1e4, 4, VOCABULARY),
            norm_dtype=jnp.float32,
        )
        config = module.ModelConfig(vision, text, 4, "float32", None)
        kinds = np.array([[0, 1, 1, 1, 1, 0]] * 2)

        def call(model: Any, ids: np.ndarray, pixels: np.ndarray) -> Any:
            cache = module.init_cache(config, 2, 6, 1, jnp.float32)
            options = {"segment_ids": jnp.ones((2, 6)), "token_type_ids": kinds}
            return model(ids, pixels, cache=cache, **options)

        return _case(lambda rngs: module.Gemma3Model(config, rngs=rngs), IDS, image, call=call)

    def llada(declared: bool = False) -> Case:
        module = of("llada")
        config = module.ModelConfig(
            *(jnp.float32, 16, 2, 1, 2, 0.0, 16, 1e4, False, False, VOCABULARY, VOCABULARY, 24),
            module.ShardingConfig.no_sharding(),
            False,
        )

        def call(model: Any, ids: np.ndarray) -> Any:
            return model(ids, jnp.ones(ids.shape, jnp.int32), jax.random.key(0))[0]

        embed = adalora.Layout("embedding", kind="embed")
        layers = {module.ShardedEmbedding: embed} if declared else None
        make = lambda rngs: module.LLaDAModel(config, rngs=rngs)  # noqa: E731
        return _case(make, IDS, call=call, layers=layers, mesh=jax.make_mesh((1,), ("fsdp",)))

    def mamba2(tied: bool) -> Case:
        module = of("mamba2")
        config = module.ModelConfig(
            vocab_size=VOCABULARY, hidden_size=16, state_size=8, head_dim=8, chunk_size=4
        )
        config = module.dataclasses.replace(config, num_hidden_layers=2, tie_word_embeddings=tied)

        def call(model: Any, ids: np.ndarray) -> Any:
            return model(ids)["logits"]

        return _case(lambda rngs: module.Mamba2ForCausalLM(config, rngs=rngs), IDS, call=call)

    def forecaster() -> Case:
        module = of("mamba2")
        sizes = {"d_model": 16, "n_layers": 1, "d_state": 8, "headdim": 8, "chunk_size": 4}
        make = lambda rngs: module.Mamba2Forecaster(3, **sizes, rngs=rngs)  # noqa: E731
        return _case(make, floats(2, 6, 3))

    def qwen3() -> Case:
        module = of("qwen3")
        config = module.ModelConfig(2, VOCABULARY, 16, 24, 4, 8, 2, 10_000, 1, 1e4, 1e-6, False)

        def call(model: Any, ids: np.ndarray) -> Any:
            cache = module.init_cache(config, 2, 6, 1, jnp.float32)
            return model(ids, cache=cache, segment_ids=jnp.ones(ids.shape, jnp.int32))

        return _case(lambda rngs: module.Qwen3(config, rngs=rngs), IDS, call=call)

    def qwen3_vl(declared: bool = False) -> Case:
        module = of("qwen3_vl")
        vision = module.Qwen3VLVisionConfig(
            *(1, 16, 24, 2, 3, 4, 2, 2, 16, 16), deepstack_visual_indexes=(0,)
        )
        text = module.Qwen3VLTextConfig(VOCABULARY, 16, 24, 2, 4, 2, 8, mrope_section=(2, 1, 1))
        config = module.ModelConfig(vision, text)
        patches = floats(16, 3 * 2 * 4 * 4)
        kinds = np.array([[0, 1, 1, 1, 1, 0]] * 2)

        def call(model: Any, ids: np.ndarray, pixels: np.ndarray) -> Any:
            cache = module.init_cache(config, 2, 6, 1, jnp.float32)
            grid = np.array([[1, 4, 4]])
            return model(ids, pixels, grid, cache=cache, token_type_ids=kinds)

        embed = adalora.Layout("embedding", kind="embed")
        layers = {module.ShardedEmbedding: embed} if declared else None
        make = lambda rngs: module.Qwen3VLForConditionalGeneration(config, rngs=rngs)  # noqa: E731
        mesh = jax.make_mesh((1,), ("fsdp",))
        return _case(make, IDS, patches, call=call, layers=layers, mesh=mesh)

    def resnet() -> Case:
        module = of("resnet")
        config = module.ModelConfig([1, 1, 1, 1], 5)
        return _case(lambda rngs: module.ResNet(config, rngs=rngs), images)

    def umt5(name: str, **inputs: np.ndarray) -> Case:
        module = of("umt5")
        config = module.ModelConfig(
            *(VOCABULARY, 16, 8, 24, 1, 1, 2), relative_attention_num_buckets=8, dropout_rate=0.0
        )
        return _case(lambda rngs: getattr(module, name)(config, rngs=rngs), **inputs)

    def unet() -> Case:
        module = of("unet")
        config = module.ModelConfig(3, 2, (4, 8, 16, 32, 64))
        return _case(lambda rngs: module.UNet(config, rngs=rngs), images)

    def vae() -> Case:
        module = of("vae")
        config = module.ModelConfig((8, 12), 4, 4)
        return _case(lambda rngs: module.VAE(config, rngs=rngs), image)

    def vgg() -> Case:
        module = of("vgg19")
        config = module.ModelConfig(5, [1, 1, 1, 1, 1], [4, 4, 6, 6, 8, 8])
        return _case(lambda rngs: module.VGG(config, rngs=rngs), images)

    def vit() -> Case:
        module = of("vit")
        config = module.ModelConfig((8, 8), (4, 4), 3, 16, 0.0, 0.0, 2, 24, 1e-6, 2, 5)
        make = lambda rngs: module.ViTClassificationModel(config, rngs=rngs)  # noqa: E731
        return _case(make, image, rngs=None)

    def vjepa2() -> Case:
        module = of("vjepa2")
        sizes = {"hidden_size": 12, "num_attention_heads": 2, "num_hidden_layers": 1}
        sizes |= {"pred_hidden_size": 12, "pred_num_attention_heads": 2}
        sizes |= {"pred_num_hidden_layers": 1, "crop_size": 8, "frames_per_clip": 2}
        config = module.ModelConfig(patch_size=4, num_pooler_layers=1, num_labels=5, **sizes)
        make = lambda rngs: module.VJEPA2ForVideoClassification(config, rngs=rngs)  # noqa: E731
        return _case(make, floats(2, 2, 8, 8, 3))

    def whisper() -> Case:
        module = of("whisper")
        sizes = {"d_model": 16, "max_length": 16, "max_source_positions": 6, "num_mel_bins": 8}
        for part in ("encoder", "decoder"):
            sizes |= {f"{part}_attention_heads": 2, f"{part}_ffn_dim": 24, f"{part}_layers": 1}
        tiny = module.ModelConfig.whisper_tiny()
        config = module.dataclasses.replace(tiny, vocab_size=VOCABULARY, **sizes)

        def call(model: Any, audio: np.ndarray, ids: np.ndarray) -> Any:
            return model.decoder(ids, None, model.encoder(audio), None, decode=False)

        return _case(
            lambda rngs: module.Whisper(config, rngs=rngs), floats(2, 12, 8), IDS, call=call
        )

    both = {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}
    return {
        "ConvNeXt": convnext,
        "DenseNet": densenet,
        "DINOv3": dinov3,
        "DINOv3, gated": lambda: dinov3(use_gated_mlp=True),
        "EfficientNet": efficientnet,
        "Gemma 3": gemma3,
        "LLaDA": llada,
        "LLaDA, embedding declared": lambda: llada(declared=True),
        "Mamba 2": lambda: mamba2(tied=False),
        "Mamba 2, tied": lambda: mamba2(tied=True),
        "Mamba 2, forecaster": forecaster,
        "Qwen 3": qwen3,
        "Qwen 3-VL": qwen3_vl,
        "Qwen 3-VL, embedding declared": lambda: qwen3_vl(declared=True),
        "ResNet": resnet,
        "UMT5": lambda: umt5("UMT5Model", **both),
        "UMT5, encoder": lambda: umt5("UMT5EncoderModel", input_ids=IDS),
        "U-Net": unet,
        "VAE": vae,
        "VGG": vgg,
        "ViT": vit,
        "V-JEPA 2": vjepa2,
        "Whisper": whisper,
    }


def flax() -> Builds:
    """Return the NNX models of Flax's examples: mnist and gemma."""

    def mnist() -> Case:
        module = importlib.import_module("examples.mnist.train")
        return _case(lambda rngs: module.CNN(rngs), floats(2, 28, 28, 1), nnx.Rngs(0))

    def gemma(version: str) -> Case:
        # Its modules import each other by their names alone.
        sys.path.insert(0, importlib.import_module("examples").__path__[0] + "/gemma")
        module = importlib.import_module("transformer")
        configs = importlib.import_module("transformer_cfg")
        kinds = importlib.import_module("modules").AttentionType
        third = version == "3"
        config = configs.TransformerConfig(
            *(2, VOCABULARY, 16, 24, 4, 8, 2, None if third else 30.0, third, third),
            (kinds.LOCAL_SLIDING, kinds.GLOBAL) if third else (kinds.GLOBAL,) * 2,
            use_qk_norm=third,
            sliding_window_size=4 if third else None,
        )

        def call(model: Any, ids: np.ndarray) -> Any:
            positions = jnp.broadcast_to(jnp.arange(6), (2, 6))
            mask = jnp.broadcast_to(jnp.tril(jnp.ones((6, 6), bool)), (2, 6, 6))
            return model(ids, positions, None, mask)[0]

        return _case(lambda rngs: module.Transformer(config, rngs=rngs), IDS, call=call)

    return {
        "mnist": mnist,
        "gemma": lambda: gemma("1"),
        "gemma 3": lambda: gemma("3"),
    }
