"""Deliberate differences from PEFT's allocation; each test shows both behaviours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adalora_jax as adalora
from adalora_jax import AdaLoraConfig
from adalora_jax._src.core import evaluation
from parity import adalora_side, peft_side
from parity.cases import Case, inputs

peft, torch = peft_side.peft, peft_side.torch
pytestmark = pytest.mark.parity


def both(case: Case):
    """Return a new PEFT model, our config, and our initial adapters with the same values."""
    peft_model = peft_side.build(case)
    config = AdaLoraConfig.from_peft(peft_side.config_of(peft_model).to_dict())
    return peft_model, config, peft_side.adapters(peft_model)


def config(steps, ranks, tinit=0, tfinal=0, interval=1, **others):
    names = ("total_step", "init_r", "target_r", "tinit", "tfinal", "deltaT")
    return dict(zip(names, (steps, *ranks, tinit, tfinal, interval))) | {"lora_alpha": 16} | others


def kept(masks) -> int:
    return sum(int(np.sum(mask)) for mask in jax.tree.leaves(masks))


def nonzero(adapters) -> int:
    return sum(int(np.sum(np.asarray(lam) != 0)) for _, lam, _ in adapters.values())


def random_gradients(adapters, seed):
    """Draw one gradient for both sides, in our layout."""
    rng = np.random.default_rng(seed)
    return {
        name: tuple(rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves)
        for name, leaves in adapters.items()
    }


def set_gradients(peft_model, gradients) -> None:
    for name, (p, lam, q) in gradients.items():
        layer = getattr(peft_model.base_model.model, name)
        layer.lora_A["default"].grad = torch.tensor(q)
        layer.lora_B["default"].grad = torch.tensor(p.T.copy())
        layer.lora_E["default"].grad = torch.tensor(lam[:, None])


def test_equal_scores_prune_all_in_peft_and_keep_budget_here():
    """PEFT drops all triplets whose score is at most the k-th lowest; we keep exactly b."""
    peft_model, config_, adapters = both(Case("chain2", config(20, (6, 2), beta1=0.5, beta2=0.5)))
    ones = {name: tuple(np.ones_like(leaf) for leaf in a) for name, a in adapters.items()}
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.fill_(1.0)
    set_gradients(peft_model, ones)
    peft_model.base_model.update_and_allocate(4)
    assert peft_model.base_model.rankallocator.budget_schedule(4) == (8, True)
    assert peft_side.nonzero(peft_model) == 0

    state = adalora.init_state(adalora_side.from_arrays(ones), config_)
    state, masks = adalora.allocate(state, adalora_side.from_arrays(ones), 4)
    assert int(state.allocator.budget) == kept(masks) == nonzero(state.adapters) == 8


def test_init_r_equal_to_target_r_crashes_peft_and_trains_unpruned_here():
    case = Case("chain2", config(20, (4, 4)))
    peft_model, config_, adapters = both(case)
    with pytest.raises(RuntimeError, match="kthvalue"):
        list(peft_side.train(case, peft_model))

    *_, last = adalora_side.train(case, config_, adapters, scale=config_.scaling)
    assert last.budget == kept(last.masks) == nonzero(last.adapters) == 8


def test_init_r_below_target_r_fails_late_in_peft_and_at_once_here():
    case = Case("chain2", config(20, (4, 6), tinit=5))
    peft_model = peft_side.build(case)
    steps = peft_side.train(case, peft_model)
    assert [next(steps).budget for _ in range(6)] == [8] * 6
    with pytest.raises(RuntimeError, match="kthvalue"):
        next(steps)

    with pytest.raises(ValueError, match="`init_r=4`: is below target_r=6"):
        AdaLoraConfig.from_peft(peft_side.config_of(peft_model).to_dict())


def test_infinite_gradients_end_pruning_in_peft_and_are_skipped_here():
    """As after an overflow under loss scaling, the optimizer skips the step."""
    case = Case("chain2", config(80, (6, 2), 10, 20), overflow=30)
    peft_model, config_, adapters = both(case)
    own = list(adalora_side.train(case, config_, adapters, scale=config_.scaling))
    peft_ = list(peft_side.train(case, peft_model))

    assert kept(own[29].masks) == kept(peft_[29].masks) == peft_[29].budget < 12
    assert np.isnan(peft_[30].uncertainty["layer0"][0]).all()
    assert {kept(snapshot.masks) for snapshot in peft_[30:]} == {12}
    assert nonzero(peft_[-1].adapters) == 12

    for name, averages in own[29].sensitivity.items():
        for before, after in zip(averages, own[30].sensitivity[name]):
            np.testing.assert_array_equal(before, after)
    assert [kept(snapshot.masks) for snapshot in own[30:]] == [s.budget for s in own[30:]]
    assert kept(own[-1].masks) == nonzero(own[-1].adapters) == 4


def test_without_final_phase_peft_ends_unpruned_and_we_at_target():
    """tfinal = 0: PEFT's last mask falls on a multiple of deltaT, and every λ grows back."""
    case = Case("chain2", config(80, (6, 2), 10, 0, 4))
    peft_model, config_, adapters = both(case)
    *_, peft_last = peft_side.train(case, peft_model)
    assert kept(peft_last.masks) == 4
    assert nonzero(peft_last.adapters) == 12

    *_, last = adalora_side.train(case, config_, adapters, scale=config_.scaling)
    assert kept(last.masks) == nonzero(last.adapters) == 4


def test_start_after_final_step_crashes_peft_and_prunes_here():
    peft_model, config_, adapters = both(Case("chain2", config(80, (6, 2), 10, 20)))
    gradients = random_gradients(adapters, 0)
    set_gradients(peft_model, gradients)
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'keys'"):
        peft_model.base_model.update_and_allocate(61)

    state = adalora.init_state(adalora_side.from_arrays(adapters), config_)
    _, masks = adalora.allocate(state, adalora_side.from_arrays(gradients), 61)
    assert kept(masks) == 4


def test_skipped_final_step_ends_above_target_in_peft_and_at_target_here():
    """The step count jumps, as after a restart, past PEFT's final step total_step - tfinal = 60."""
    peft_model, config_, adapters = both(Case("chain2", config(80, (6, 2), 0, 20)))
    state = adalora.init_state(adalora_side.from_arrays(adapters), config_)
    for step in (*range(31), *range(61, 80)):
        gradients = random_gradients(adapters, step)
        set_gradients(peft_model, gradients)
        peft_model.base_model.update_and_allocate(step)
        state, masks = adalora.allocate(state, adalora_side.from_arrays(gradients), step)
    assert peft_model.base_model.rankallocator.budget_schedule(79)[0] == 4
    assert kept(peft_side.masks(peft_model)) == 5
    assert kept(masks) == 4


def test_between_masks_peft_is_unpruned_and_our_state_has_the_masks():
    """deltaT = 4: in both the pruned λ grow back, so that they can be revived; here the masks are
    stored for evaluation and export, and ``freeze_pruned`` prevents the growth."""
    case = Case("chain2", config(80, (6, 2), 10, 20, 4), steps=31)
    peft_model, config_, adapters = both(case)
    peft_nonzero = [nonzero(snapshot.adapters) for snapshot in peft_side.train(case, peft_model)]
    assert peft_nonzero[24:] == [6, 12, 12, 12, 6, 12, 12]

    own = list(adalora_side.train(case, config_, adapters, scale=config_.scaling))
    assert [nonzero(snapshot.adapters) for snapshot in own] == peft_nonzero
    masked = [
        evaluation.apply_masks(adalora_side.from_arrays(snapshot.adapters), snapshot.masks)
        for snapshot in own
    ]
    assert [nonzero(adapters) for adapters in masked[24:]] == [6] * 7

    held = adalora_side.train(
        case, config_.replace(freeze_pruned=True), adapters, scale=config_.scaling
    )
    assert [nonzero(snapshot.adapters) for snapshot in held][24:] == [6] * 7


def test_forgotten_call_leaves_peft_unpruned_and_is_not_needed_here():
    case = Case("chain2", config(40, (6, 2), 5, 10))
    peft_model, config_, adapters = both(case)
    peft_model.base_model.update_and_allocate = lambda step: None
    *_, peft_last = peft_side.train(case, peft_model)
    assert nonzero(peft_last.adapters) == 12

    *_, last = adalora_side.train(case, config_, adapters, scale=config_.scaling)
    assert nonzero(last.adapters) == 4


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")
def test_saved_run_cannot_be_pruned_in_peft_and_resumes_bitwise_here(tmp_path):
    case = Case("chain2", config(60, (6, 2), 0, 10))
    given = inputs(case)
    peft_model, config_, adapters = both(case)
    steps = peft_side.train(case, peft_model)
    for _ in range(20):
        next(steps)
    peft_model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(peft_side.base_model(case), tmp_path, is_trainable=True)
    # The pruned rows are gone, but PEFT still counts the budget from all rows.
    left = peft_side.adapters(loaded)
    assert sum(lam.size for _, lam, _ in left.values()) == 5
    set_gradients(loaded, random_gradients(left, 0))
    with pytest.raises(RuntimeError, match="kthvalue"):
        loaded.base_model.update_and_allocate(20)

    batches = adalora_side.cast(list(zip(given.x, given.y)), jnp.float32)
    *state, step = adalora_side.start(case, config_, adapters, given.weights, scale=config_.scaling)
    for i, (x, y) in enumerate(batches):
        if i == 20:
            resumed = saved = jax.tree.map(np.array, state)
        *state, _ = step(*state, x, y, False)
    for x, y in batches[20:]:
        *resumed, _ = step(*resumed, x, y, False)
    assert kept(adalora.allocator_state(saved).masks) == 5
    assert kept(adalora.allocator_state(resumed).masks) == 4
    for straight, again in zip(jax.tree.leaves(state), jax.tree.leaves(resumed)):
        np.testing.assert_array_equal(straight, again)
