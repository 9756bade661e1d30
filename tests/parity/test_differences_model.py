"""Deliberate differences from PEFT's adapted model; each test shows both behaviours."""

import jax.numpy as jnp
import numpy as np
import pytest

import adalora_jax as adalora
from adalora_jax import AdaLoraConfig
from parity import adalora_side, peft_side
from parity.cases import Case, inputs

peft, torch = peft_side.peft, peft_side.torch
pytestmark = pytest.mark.parity

transformers_own_warning = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing:FutureWarning"
)

CONFIG = {"total_step": 40, "init_r": 6, "target_r": 2, "tfinal": 10, "lora_alpha": 16}


@pytest.fixture
def bert():
    """Return a function that adapts a small transformers model without dropout, and a batch."""
    transformers = pytest.importorskip(
        "transformers", reason="needs transformers: pip install '.[parity]'"
    )
    tiny = transformers.BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    batch = {"input_ids": torch.arange(12).reshape(2, 6), "labels": torch.tensor([0, 1])}

    def adapt(task_type):
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(tiny)
        config = peft.AdaLoraConfig(
            task_type=task_type, target_modules=["query", "value"], **CONFIG
        )
        return peft.get_peft_model(model, config)

    return adapt, batch


def penalty(peft_model) -> float:
    """Compute this library's orthogonality term of PEFT's adapters."""
    config = AdaLoraConfig.from_peft(peft_side.config_of(peft_model).to_dict())
    return float(
        adalora.orthogonality(adalora_side.from_arrays(peft_side.adapters(peft_model)), config)
    )


@transformers_own_warning
def test_peft_omits_regulariser_without_task_type_and_ours_is_explicit(bert):
    adapt, batch = bert
    without, with_ = adapt(None), adapt("SEQ_CLS")
    bare = without(**batch).loss.item()
    # Model and batch are the same and λ = 0, so only the regulariser can differ.
    assert with_(**batch).loss.item() - bare == pytest.approx(penalty(with_), rel=1e-5)
    assert penalty(without) > 0.9
    assert without.base_model(**batch).loss.item() == pytest.approx(bare + penalty(without))


@transformers_own_warning
def test_evaluation_loss_includes_regulariser_in_peft_but_not_here(bert):
    adapt, batch = bert
    peft_model = adapt("SEQ_CLS").eval()
    with torch.no_grad():
        evaluated = peft_model(**batch).loss.item()
        plain = peft_model.get_base_model()(**batch).loss.item()
    assert evaluated == pytest.approx(plain + penalty(peft_model))

    # Ours is in the loss only if the training loop adds it; the forward pass does not include it.
    case = Case("chain2", CONFIG)
    given = inputs(case)
    adapters = peft_side.adapters(peft_side.build(case))
    params = {"adapters": adalora_side.from_arrays(adapters), "head": {}}
    loss = adalora_side.task_loss(
        case,
        adalora_side.cast(given.weights, jnp.float32),
        params,
        *adalora_side.cast((given.x[0], given.y[0]), jnp.float32),
        scale=1.0,
    )
    with torch.no_grad():
        x, y = (torch.tensor(array[0], dtype=torch.float32) for array in (given.x, given.y))
        assert float(loss) == pytest.approx(peft_side.base_model(case)(x, y).loss.item(), rel=1e-5)


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")
def test_reload_with_alpha_zero_shrinks_increment_in_peft_but_not_here(tmp_path):
    """alpha <= 0 means alpha = r, and PEFT reads r again from the pruned rows."""
    case = Case("chain2", CONFIG | {"lora_alpha": 0}, learning_rate=1e-2)
    peft_model = peft_side.build(case)
    *_, last = peft_side.train(case, peft_model)
    peft_model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(peft_side.base_model(case), tmp_path)
    for name, mask in last.masks.items():
        trained, again = (
            peft_side.array(getattr(m.base_model.model, name).get_delta_weight("default")).T
            for m in (peft_model, loaded)
        )
        np.testing.assert_allclose(again, trained * mask.sum() / mask.size, atol=1e-7)

        adapter = adalora.Adapter(*map(jnp.asarray, last.adapters[name]))
        cut = adalora.Adapter(*(leaf[mask] for leaf in adapter))
        for kept in (adapter, cut):
            delta = adalora.delta_weight(kept)
            np.testing.assert_allclose(delta, trained, rtol=1e-4, atol=1e-6)
    assert 0 < sum(mask.sum() for mask in last.masks.values()) < 12


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_scale_drifts_in_peft_unless_float32_and_is_fixed_here(dtype):
    """PEFT casts ``ranknum``, the scale's divisor, to the dtype of the base model, which makes it a
    trainable parameter; every optimizer of all trainable parameters then changes it."""
    case = Case("chain2", CONFIG | {"lora_alpha": 8}, learning_rate=1e-2)
    config = peft.AdaLoraConfig(target_modules=["layer0", "layer1"], **case.config)
    for own_dtype, trainable in ((torch.float32, False), (getattr(torch, dtype), True)):
        peft_model = peft.get_peft_model(peft_side.base_model(case, own_dtype), config)
        divisors = [p for name, p in peft_model.named_parameters() if "ranknum" in name]
        assert [p.requires_grad for p in divisors] == [trainable] * 2
    given = inputs(case)
    opt = peft_side.optimizer(peft_model, case)
    for step, arrays in enumerate(zip(given.x, given.y)):
        x, y = (torch.tensor(array, dtype=getattr(torch, dtype)) for array in arrays)
        peft_model.base_model(x, y).loss.backward()
        opt.step()
        peft_model.base_model.update_and_allocate(step)
        opt.zero_grad()
    assert all(abs(divisor.item() - 6) > 0.1 for divisor in divisors)

    # Our scale is a number in the config, not a parameter.
    config = AdaLoraConfig.from_peft(config.to_dict())
    assert config.scaling == 8 / 6
    assert set(adalora.Adapter._fields) == {"p", "lam", "q"}


def test_adapter_name_in_another_crashes_peft_and_is_separate_here():
    """PEFT finds an adapter's parameters by substring: "default" is also in "default2"."""
    case = Case("chain2", CONFIG)
    peft_model = peft_side.build(case)
    adapters = peft_side.adapters(peft_model)
    frozen = peft.AdaLoraConfig(
        target_modules=["layer0", "layer1"], inference_mode=True, **case.config
    )
    peft_model.add_adapter("default2", frozen)
    with pytest.raises(TypeError, match="'Parameter' and 'NoneType'"):
        list(peft_side.train(case, peft_model))

    config = AdaLoraConfig.from_peft(case.config)
    both = {
        "default": adalora_side.from_arrays(adapters),
        "default2": adalora_side.from_arrays(adapters),
    }
    state = adalora.init_state({"default": both["default"]}, config)
    state, masks = adalora.allocate(state, {"default": both["default"]}, 35)
    assert set(adalora.ranks(masks)) == {"default/layer0", "default/layer1"}
    assert sum(adalora.ranks(masks).values()) == 4
