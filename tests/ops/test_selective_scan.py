"""selective_scan against its equation in numpy, in every form, and what its chunked form keeps in memory."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memzoo import ops

B, T, D, N = 2, 39, 5, 3
CHUNK = 16  # two whole chunks and a piece
FORMS = {"scan": {}, "associative": {}, "chunk": {"chunk": CHUNK}}


def make(decay="mixed"):
    rng = np.random.default_rng(0)
    n = lambda *shape: rng.standard_normal(shape)
    A = -np.exp(rng.uniform(np.log(0.1), np.log(20), (N, D)))
    dt = {
        "weak": 1e-3 * rng.uniform(size=(B, T, D)),
        "strong": 50 * rng.uniform(0.5, 1, (B, T, D)),
        "mixed": np.exp(rng.uniform(np.log(1e-3), np.log(100), (B, T, D))),
        "none": rng.uniform(size=(B, T, D)),
        "often idle": rng.uniform(-1, 1, (B, T, D)).clip(0),
    }[decay]
    A = 0 * A if decay == "none" else A
    reset_BT = np.zeros((B, T), bool)
    reset_BT[0, [0, 20, 21]] = reset_BT[1, [3, 9, T - 1]] = True
    return [n(B, T, D), dt, A, n(B, T, N), n(B, T, N), n(B, N, D)], reset_BT


def in_numpy(x, dt, A, B_, C, h, reset):
    """A loop over rows, tokens, channels and states."""
    y, h = np.zeros_like(x), h.copy()
    for b, t, d in np.ndindex(x.shape):
        for n in range(len(A)):
            old = 0.0 if reset[b, t] else h[b, n, d]
            h[b, n, d] = math.exp(dt[b, t, d] * A[n, d]) * old + dt[b, t, d] * B_[b, t, n] * x[b, t, d]
            y[b, t, d] += C[b, t, n] * h[b, n, d]
    return y, h


def run(impl):
    def loss(arrays, reset, w_BTD, w_BND):
        y_BTD, h_BND = ops.selective_scan(*arrays, reset, impl=impl, **FORMS[impl])
        return jnp.sum(y_BTD * w_BTD) + jnp.sum(h_BND * w_BND), (y_BTD, h_BND)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


RUN = {impl: run(impl) for impl in FORMS}


def weights():
    rng = np.random.default_rng(1)
    return [jnp.asarray(rng.standard_normal(s)) for s in ((B, T, D), (B, N, D))]


@pytest.mark.parametrize("x64", (False, True), ids=("float32", "float64"))
@pytest.mark.parametrize("decay", ("weak", "strong", "mixed", "none", "often idle"))
@pytest.mark.cases(3)
def test_forms_agree_with_the_equation(decay, x64):
    tolerance = 1e-10 if x64 else 1e-5
    with jax.enable_x64(x64):
        arrays, reset = make(decay)
        wanted = in_numpy(*arrays, reset)
        arrays = [jnp.asarray(a) for a in arrays]
        _, want = RUN["scan"](arrays, reset, *weights())
        for impl in FORMS:
            (_, got), gradients = RUN[impl](arrays, reset, *weights())
            for one, other in zip((*got, *gradients), (*wanted, *want), strict=True):
                rms = np.sqrt(np.mean(np.square(other)))
                assert np.sqrt(np.mean(np.square(one - other))) <= tolerance * rms, impl


@pytest.mark.parametrize("impl", FORMS)
def test_gradient_is_the_difference_quotient(impl):
    """In float64 and in every array, against (f(z + e) - f(z - e)) / 2e along a random direction."""
    with jax.enable_x64(True):
        arrays, reset = make()
        along = [np.sin(1 + np.arange(a.size)).reshape(a.shape) for a in arrays]
        f = lambda e: RUN[impl]([jnp.asarray(a + e * d) for a, d in zip(arrays, along, strict=True)], reset, *weights())
        _, gradients = f(0.0)
        slope = sum(float(jnp.sum(g * d)) for g, d in zip(gradients, along, strict=True))
        np.testing.assert_allclose(slope, (f(1e-6)[0][0] - f(-1e-6)[0][0]) / 2e-6, rtol=1e-6)


def test_second_derivatives():
    arrays, reset = make("weak")

    def twice(impl):
        def inner(x):
            y_BTD, _ = ops.selective_scan(x, *arrays[1:], reset, impl=impl, **FORMS[impl])
            return jnp.sum(jnp.sin(y_BTD))

        return jax.jit(jax.grad(lambda x: jnp.sum(jax.grad(inner)(x) ** 2)))(jnp.asarray(arrays[0]))

    np.testing.assert_allclose(twice("chunk"), twice("scan"), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("impl", FORMS)
def test_nothing_crosses_a_reset(impl):
    arrays, _ = make("weak")
    reset = np.zeros((B, T), bool)
    reset[:, [0, 20]] = True
    w = [np.ones((B, T, D), "f"), np.ones((B, N, D), "f")]
    broken = [*arrays[:-1], np.full((B, N, D), np.nan)]
    (_, got), gradients = RUN[impl](broken, reset, *w)
    assert all(np.isfinite(leaf).all() for leaf in (*got, *gradients))
    for bad in (np.inf, np.nan):
        arrays[0][:, 10] = bad
        y_BTD, h_BND = ops.selective_scan(*arrays, reset, impl=impl, **FORMS[impl])
        assert not np.isfinite(y_BTD[:, 10:20]).any()
        assert np.isfinite(y_BTD[:, 20:]).all() and np.isfinite(h_BND).all()


@pytest.mark.parametrize("length", (1, 2, CHUNK, CHUNK + 1))
def test_any_length(length):
    (x, dt, A, B_, C, h), reset = make("weak")
    cut = [z[:, :length] for z in (x, dt, B_, C, reset)]
    x, dt, B_, C, reset = cut
    want_BTD, want_BND = in_numpy(x, dt, A, B_, C, h, reset)
    y_BTD, h_BND = ops.selective_scan(x, dt, A, B_, C, h, reset, impl="chunk", chunk=CHUNK)
    np.testing.assert_allclose(y_BTD, want_BTD, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(h_BND, want_BND, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", FORMS)
def test_no_step_leaves_the_state_as_it_is(impl):
    (x, dt, *rest, h), _ = make("weak")
    _, h_BND = ops.selective_scan(x, 0 * dt, *rest, h, impl=impl, **FORMS[impl])
    np.testing.assert_array_equal(h_BND, h.astype("f"))


@pytest.mark.parametrize("impl", FORMS)
def test_without_decay_is_a_cumulative_sum(impl):
    (x, dt, A, B_, C, h), _ = make("none")
    y_BTD, _ = ops.selective_scan(x, dt, A, B_, C, h, impl=impl, **FORMS[impl])
    h_BTND = h[:, None] + np.cumsum(B_[..., None] * (dt * x)[:, :, None], 1)
    np.testing.assert_allclose(y_BTD, np.einsum("btn,btnd->btd", C, h_BTND), rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_dtypes():
    """Inputs in bfloat16, steps and state in float32: y in bfloat16, and gradients in the dtype of what they are of."""
    arrays, reset = make("weak")
    half = [jnp.asarray(z, jnp.bfloat16 if i in (0, 3, 4) else jnp.float32) for i, z in enumerate(arrays)]
    for impl in FORMS:

        def loss(arrays, impl=impl):
            y_BTD, h_BND = ops.selective_scan(*arrays, reset, impl=impl, **FORMS[impl])
            assert (y_BTD.dtype, h_BND.dtype) == (jnp.bfloat16, jnp.float32)
            return jnp.sum(y_BTD.astype(jnp.float32)) + jnp.sum(h_BND)

        gradients = jax.grad(loss)(half)
        assert [g.dtype for g in gradients] == [z.dtype for z in half]


def test_bad_arguments_are_named():
    (x, dt, A, B_, C, h), _ = make()
    with pytest.raises(ValueError, match="A_ND: expected D = 5 as in x_BTD"):
        ops.selective_scan(x, dt, A[:, :4], B_, C)
    with pytest.raises(ValueError, match="C_BTN: expected N = 3 as in A_ND"):
        ops.selective_scan(x, dt, A, B_, C[..., :2])
    with pytest.raises(ValueError, match=r"h_BND: expected B = 2 as in x_BTD, got shape \[1, 3, 5\]"):
        ops.selective_scan(x, dt, A, B_, C, h[:1])
    with pytest.raises(ValueError, match="chunk: expected an integer >= 1"):
        ops.selective_scan(x, dt, A, B_, C, chunk=0)
    with pytest.raises(NotImplementedError, match="selective_scan has no form 'newton'"):
        ops.selective_scan(x, dt, A, B_, C, impl="newton")


def shapes(T, D=32, N=16):
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    return shape(B, T, D), shape(B, T, D), shape(N, D), shape(B, T, N), shape(B, T, N), shape(B, N, D)


def compiled(impl, T, gradient):
    def loss(*args):
        y_BTD, h_BND = ops.selective_scan(*args, impl=impl)
        return jnp.sum(y_BTD**2) + jnp.sum(h_BND**2)

    f = jax.grad(loss, argnums=tuple(range(6))) if gradient else loss
    return jax.jit(f).lower(*shapes(T)).compile()


def largest(executable):
    found = re.findall(r"f32\[([\d,]+)\]", executable.as_text())
    return max(math.prod(map(int, shape.split(","))) for shape in found)


@pytest.mark.long
@pytest.mark.parametrize("gradient", (False, True), ids=("forward", "gradient"))
def test_no_state_per_token_and_linear_growth(gradient):
    """Nothing near [B, T, N, D]: the largest tensor has the size of an input or of one chunk of states."""
    temporary = {}
    for T in (1024, 2048):
        executable = compiled("chunk", T, gradient)
        assert largest(executable) <= max(B * T * 32, B * 64 * 16 * 32)
        temporary[T] = executable.memory_analysis().temp_size_in_bytes
        assert temporary[T] < 4 * B * T * 16 * 32
    assert temporary[2048] <= 2.05 * temporary[1024]
    assert largest(compiled("associative", 1024, gradient)) >= B * 1024 * 16 * 32, "the test sees states per token"


def test_what_the_gradient_saves():
    """The inputs, which tokens are resets, and one state per chunk."""
    T = 1024
    saved = jax.eval_shape(lambda *a: jax.vjp(lambda *a: ops.selective_scan(*a, impl="chunk"), *a)[1], *shapes(T))
    bytes_of = lambda tree: sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    assert bytes_of(saved) <= bytes_of(shapes(T)) + B * T + 4 * B * (T // 64) * 16 * 32
