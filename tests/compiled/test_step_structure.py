"""Structure of a compiled training step: its operations and memory, not wall-clock time."""

from __future__ import annotations

import cProfile
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from support.compiling import AS_USERS, skip_unless_cpu

import adalora_jax as adalora
from adalora_jax._src.core import averages

RANK, TOKENS, WIDTH, HIDDEN = 4, 96, 40, 56
CONFIG = adalora.AdaLoraConfig(
    total_step=10, init_r=RANK, target_r=2, target_modules="all-linear", init_lora_weights=False
)
COPIES = ("copy", "transpose", "reverse", "concatenate")
INSIDE = "on a GPU, transposes are parts of other kernels"


class Dense(nn.Module):
    matrices = 2 * ((WIDTH, HIDDEN), (HIDDEN, WIDTH))

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(HIDDEN)(x)))
        return x


class Heads(nn.Module):
    """Kernels with several output and several input axes."""

    matrices = 2 * ((WIDTH, HIDDEN), (HIDDEN, WIDTH))

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            heads = nn.gelu(nn.DenseGeneral((7, HIDDEN // 7))(x))
            x = x + nn.DenseGeneral(WIDTH, axis=(-2, -1))(heads)
        return x


class Equations(nn.Module):
    matrices = ((WIDTH, HIDDEN), (HIDDEN, WIDTH))

    @nn.compact
    def __call__(self, x):
        up = nn.gelu(nn.Einsum((WIDTH, HIDDEN), "btd,df->btf")(x))
        return x + nn.Einsum((HIDDEN, WIDTH), "btf,fd->btd")(up)


MODELS = [Dense, Heads, Equations]


def lowered(make, dropout):
    """Lower the adapters' training gradient, and the frozen model's gradient of its input."""
    model, x = make(), jax.random.normal(jax.random.key(0), (4, TOKENS // 4, WIDTH))
    variables = model.init(jax.random.key(1), x)
    adapted = adalora.linen.adapt(model, CONFIG.replace(lora_dropout=dropout))
    adapters = adapted.init(jax.random.key(2), variables, x)
    rngs = {"rngs": {"dropout": jax.random.key(3)}} if dropout else {}

    def ours(adapters, x):
        # Includes the gradient of x, because in a deep model there is always a layer below.
        return jnp.sum(adapted.apply(variables, adapters, x, **rngs) ** 2)

    frozen = lambda x: jnp.sum(model.apply(variables, x) ** 2)
    step = jax.jit(jax.grad(ours, argnums=(0, 1))).lower(adapters, x)
    return step, jax.jit(jax.grad(frozen)).lower(x)


@pytest.mark.parametrize("make", MODELS)
def test_step_flops_are_six_skinny_matmuls(make):
    """h, y and four of the derivative; the remainder is a few operations per element."""
    skip_unless_cpu("others analyse the cost of compiled programs only")
    step, frozen = (program.cost_analysis()["flops"] for program in lowered(make, 0.0))
    products = sum(6 * 2 * TOKENS * RANK * (a + b) // 2 for a, b in make.matrices)
    elements = sum(TOKENS * (a + b) for a, b in make.matrices)
    assert products <= step - frozen <= products + 4 * elements


def elements_of(line):
    shape = re.match(r"\(?\w+\[([\d,]*)\]", line)
    return math.prod(int(size) for size in shape[1].split(",") if size) if shape else 0


def copies(program):
    """List copies of arrays as large as an activation in the whole compiled program."""
    found = re.findall(r"= (\S+) ([\w\-]+)\(", program.compile(AS_USERS).as_text())
    return [
        f"{kind} {shape}"
        for shape, kind in found
        if kind in COPIES and elements_of(shape) >= TOKENS * WIDTH
    ]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("make", MODELS)
def test_adapters_add_no_copies_or_transposes_of_activations(make, dropout):
    skip_unless_cpu(INSIDE)
    step, frozen = lowered(make, dropout)
    assert len(copies(step)) <= len(copies(frozen))


def test_plain_autodiff_transposes_an_activation():
    """Plain autodiff of the usual formula makes the test above fail."""
    skip_unless_cpu(INSIDE)
    x, a, b = (
        jnp.ones(shape) for shape in ((4, TOKENS // 4, WIDTH), (WIDTH, RANK), (RANK, HIDDEN))
    )
    loss = lambda x, a, b: jnp.sum(nn.gelu(x @ a @ b) ** 2)
    assert copies(jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, a, b))


LARGER = CONFIG.replace(init_r=12)


def many(count, stack=()):
    """Build adapters of a usual size, because small arrays are compiled differently."""
    sizes = [(384, 1536), (1536, 384)]
    make = lambda i: adalora.init_adapter(jax.random.key(i), *sizes[i % 2], LARGER, stack=stack)
    return {f"layer_{i:03d}": make(i) for i in range(count)}


def allocating(count, stack=()):
    """Lower the allocator's update in place, without allocating arrays."""
    adapters = jax.eval_shape(lambda: many(count, stack))
    state = jax.eval_shape(lambda adapters: adalora.init_state(adapters, LARGER), adapters)
    return jax.jit(adalora.allocate, donate_argnums=0).lower(state, adapters, 3)


def test_allocator_works_in_place():
    """Averages and adapters are overwritten; the only large temporary is |w · g| by role."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(many(6)))
    memory = allocating(6).compile(AS_USERS).memory_analysis()
    assert memory.alias_size_in_bytes >= 3 * size
    assert memory.temp_size_in_bytes < 1.5 * size


def test_averages_of_large_roles_are_updated_in_place(monkeypatch):
    """Only |w · g| of a few triplets is stored, and no array of a role is copied."""
    skip_unless_cpu("the averages are written in every step elsewhere")
    monkeypatch.setattr(averages, "LARGE", 0)
    jax.clear_caches()
    try:
        program = allocating(6).compile(AS_USERS)
    finally:
        jax.clear_caches()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(many(6)))
    assert program.memory_analysis().temp_size_in_bytes < 0.6 * size
    text = program.as_text()
    assert text.count(" conditional(") == 1
    assert not re.search(r"= f32\[3,12,\d+\]\S* copy\(", text)


def test_averages_and_ranking_are_only_computed_when_due():
    """Outside the conditionals nothing is searched for, and |w · g| alone is written.

    On other back ends than the CPU's, the averages have no conditional.
    """
    program = re.sub(r"/\*.*?\*/", "", allocating(6).compile(AS_USERS).as_text())
    entry = program[program.index("\nENTRY") :]
    found = re.findall(r"= (\([^=]*?\)|\S+) ([\w\-]+)\(", entry[: entry.index("\n}")])
    kinds = [kind for _, kind in found]
    assert kinds.count("conditional") == (2 if jax.default_backend() == "cpu" else 1)
    assert "while" not in kinds
    skip_unless_cpu("the averages are written in every step elsewhere")
    written = [s for s, k in found if k in (*COPIES, "fusion", "dot") and s.startswith("f")]
    by_role = ("f32[3,12,384]", "f32[3,12,1536]")
    of_one = lambda shape: "f32[12," in shape or "f32[1,12," in shape
    large = [s for s in written if elements_of(s) >= 12 * 384 and not of_one(s)]
    assert sum(s.startswith(by_role) for s in large) == len(large) == 4


def test_kernel_count_does_not_grow_with_stack_height():
    """100,000 slices take hardly more kernels than 10; long sums are split into a few."""
    kernels = lambda height: allocating(1, (height,)).compile(AS_USERS).as_text().count(" fusion(")
    assert kernels(100_000) < 2 * kernels(10)


def distinct_fusions(count):
    """Return the number of different kernels in the update: the CPU's compiler compiles each once.

    Constants with several elements are arguments of a kernel, others are parts of it.
    """
    tx = adalora.adalora(optax.adamw(1e-3), LARGER)
    adapters = jax.eval_shape(lambda: many(count))
    state = jax.eval_shape(tx.init, adapters)
    text = jax.jit(tx.update).lower(adapters, state, adapters).compile(AS_USERS).as_text()
    bodies = re.findall(r"^%?(\S+) \(.*\{\n((?:.*\n)*?)\}", text, re.MULTILINE)
    called = set(re.findall(r" fusion\(.*calls=%?([\w.-]+)", text))

    def without_names(body):
        seen = {}
        body = re.sub(r", metadata=\{.*?\}|, backend_config=.*", "", body)
        return re.sub(r"%[\w.-]+", lambda name: seen.setdefault(name[0], str(len(seen))), body)

    return len({without_names(body) for name, body in bodies if name in called})


def test_cpu_compiles_no_kernel_per_repeated_layer():
    """Eight more members per role; longer sums may be split into more kernels."""
    skip_unless_cpu("others fuse independent kernels")
    assert 0 < distinct_fusions(32) < distinct_fusions(16) + 8


def test_adapters_of_one_role_are_traced_once(monkeypatch):
    traced, plain = [], averages.smooth
    monkeypatch.setattr(averages, "smooth", lambda *args: traced.append(1) or plain(*args))
    jax.clear_caches()
    allocating(60)
    assert len(traced) == 12  # p, lam and q of two roles, for CPUs and for other platforms


def test_tracing_work_is_linear_in_number_of_layers():
    """The work is that of a first use: finding layers, making adapters and differentiating."""

    class Layers(nn.Module):
        count: int

        @nn.compact
        def __call__(self, x):
            for _ in range(self.count):
                x = nn.Dense(3)(x)
            return x

    def calls(count):
        module, x = Layers(count), jnp.ones((2, 3))
        adapted = adalora.linen.adapt(module, CONFIG)

        def start(key):
            base = module.init(key, x)
            adapters = adapted.init(key, base, x)
            loss = lambda adapters: adapted.apply(base, adapters, x).sum()
            return jax.grad(loss)(adapters)

        profile = cProfile.Profile()
        profile.runcall(jax.eval_shape, start, jax.random.key(0))
        return sum(entry.callcount for entry in profile.getstats())

    calls(20)  # excludes one-time work
    assert calls(80) < 2.1 * calls(40)
