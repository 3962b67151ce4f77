"""affine_scan against its equation in numpy, in every form.

Dims: B batch, T time, X channels.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memzoo import ops

B, T, X = 3, 45, 4
CHUNK = 8
FORMS = {"scan": {}, "associative": {}, "chunk": {"chunk": CHUNK}}


def make(kind):
    """Transitions of norm about 1, inputs, an incoming state, and resets first, last, in a row and in one chunk."""
    rng = np.random.default_rng(0)
    n = lambda *shape: rng.standard_normal(shape) + (1j * rng.standard_normal(shape) if kind == "complex" else 0)
    A = n(B, T, X, X) / np.sqrt(2 * X if kind == "complex" else X)
    if kind == "singular":  # no inverse, and rows of zeros
        A[..., 1, :] = 0
    reset_BT = np.zeros((B, T), bool)
    reset_BT[0, [0, 7, 8]] = reset_BT[1, [20, 22, T - 1]] = True
    return A, n(B, T, X), n(B, X), reset_BT


def in_numpy(A, x, h, reset):
    out, h = np.zeros(x.shape, x.dtype), h.copy()
    for t in range(x.shape[1]):
        h = np.einsum("bij,bj->bi", A[:, t], np.where(reset[:, t, None], 0, h)) + x[:, t]
        out[:, t] = h
    return out, h


def run(impl):
    def loss(arrays, reset, w_BTX, w_BX):
        h_BTX, h_BX = ops.affine_scan(*arrays, reset, impl=impl, **FORMS[impl])
        return jnp.sum(jnp.real(h_BTX * w_BTX)) + jnp.sum(jnp.real(h_BX * w_BX)), (h_BTX, h_BX)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


RUN = {impl: run(impl) for impl in FORMS}


@pytest.mark.parametrize("x64", (False, True), ids=("float32", "float64"))
@pytest.mark.parametrize("kind", ("real", "singular", "complex"))
@pytest.mark.cases(1)
def test_forms_agree_with_the_equation(kind, x64):
    tolerance = 1e-10 if x64 else 1e-5
    with jax.enable_x64(x64):
        *arrays, reset = make(kind)
        want_BTX, want_BX = in_numpy(*arrays, reset)
        rng = np.random.default_rng(1)
        w = [jnp.asarray(rng.standard_normal(s)) for s in ((B, T, X), (B, X))]
        arrays = [jnp.asarray(a) for a in arrays]
        (_, _), want = RUN["scan"](arrays, reset, *w)
        for impl in FORMS:
            (_, (h_BTX, h_BX)), gradients = RUN[impl](arrays, reset, *w)
            np.testing.assert_allclose(h_BTX, want_BTX, rtol=tolerance, atol=tolerance * 10)
            np.testing.assert_allclose(h_BX, want_BX, rtol=tolerance, atol=tolerance * 10)
            for got, wanted in zip(gradients, want, strict=True):
                np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance * 100)


@pytest.mark.parametrize("kind", ("real", "complex"))
@pytest.mark.parametrize("impl", FORMS)
def test_gradient_is_the_difference_quotient(impl, kind):
    """In float64 and in every array, against (f(z + e) - f(z - e)) / 2e along a random direction."""
    with jax.enable_x64(True):
        *arrays, reset = make(kind)
        w = [np.cos(np.arange(B * T * X)).reshape(B, T, X), np.ones((B, X))]
        turn = 1 + 0.5j if kind == "complex" else 1
        along = [turn * np.sin(1 + np.arange(a.size)).reshape(a.shape) for a in arrays]
        f = lambda e: RUN[impl]([jnp.asarray(a + e * d) for a, d in zip(arrays, along, strict=True)], reset, *w)
        _, gradients = f(0.0)
        slope = sum(float(jnp.real(jnp.sum(g * d))) for g, d in zip(gradients, along, strict=True))
        np.testing.assert_allclose(slope, (f(1e-5)[0][0] - f(-1e-5)[0][0]) / 2e-5, rtol=1e-7)


@pytest.mark.long
@pytest.mark.parametrize("impl", ("associative", "chunk"))
def test_second_derivatives_are_those_of_the_scan(impl):
    *arrays, reset = make("real")
    w = [jnp.asarray(np.cos(np.arange(B * T * X)).reshape(B, T, X), jnp.float32), jnp.ones((B, X))]
    squares = lambda impl: jax.grad(lambda arrays: sum(jnp.sum(g**2) for g in RUN[impl](arrays, reset, *w)[1]))
    arrays = [jnp.asarray(a) for a in arrays]
    for got, want in zip(squares(impl)(arrays), squares("scan")(arrays), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.cases(2)
def test_nothing_crosses_a_reset(impl):
    A, x, _, _ = make("real")
    reset = np.zeros((B, T), bool)
    reset[:, [0, 20]] = True
    w = np.ones((B, T, X), np.float32), np.ones((B, X), np.float32)
    (_, (h_BTX, h_BX)), gradients = RUN[impl]([jnp.asarray(A), jnp.asarray(x), jnp.full((B, X), jnp.nan)], reset, *w)
    for leaf in (h_BTX, h_BX, *gradients):
        assert np.isfinite(leaf).all()
    assert np.all(gradients[0][:, [0, 20]] == 0) and np.all(gradients[2] == 0)


@pytest.mark.parametrize("where", ("A", "x"))
@pytest.mark.parametrize("impl", FORMS)
def test_inf_does_not_cross_a_reset(impl, where):
    A, x, h, _ = make("real")
    (A if where == "A" else x)[:, 10] = np.inf
    reset = np.zeros((B, T), bool)
    reset[:, [12, 13]] = True
    h_BTX, h_BX = ops.affine_scan(A, x, h, reset, impl=impl, chunk=CHUNK)
    assert not np.isfinite(h_BTX[:, 10:12]).any(), "the test itself"
    assert np.isfinite(h_BTX[:, :10]).all() and np.isfinite(h_BTX[:, 12:]).all() and np.isfinite(h_BX).all()


@pytest.mark.parametrize("impl", FORMS)
def test_without_inputs_it_is_a_product_of_matrices(impl):
    A, _, h, _ = make("real")
    h_BTX, h_BX = ops.affine_scan(A, None, h, impl=impl, chunk=CHUNK)
    product = np.stack([np.linalg.multi_dot(A[b, :20][::-1]) for b in range(B)])
    np.testing.assert_allclose(h_BTX[:, 19], np.einsum("bij,bj->bi", product, h), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(h_BTX[:, -1], h_BX)
    nothing, _ = ops.affine_scan(A, impl=impl, chunk=CHUNK)
    np.testing.assert_array_equal(nothing, 0)


@pytest.mark.parametrize("impl", FORMS)
def test_diagonal_transitions_are_linear_scan(impl):
    A, x, h, reset = make("real")
    want_BTX, _ = ops.linear_scan(A[..., 0], x, h, reset, impl="scan")
    h_BTX, _ = ops.affine_scan(A[..., 0][..., None] * np.eye(X), x, h, reset, impl=impl, chunk=CHUNK)
    np.testing.assert_allclose(h_BTX, want_BTX, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", (1, 2, CHUNK, CHUNK + 1))
@pytest.mark.cases(2)
def test_any_length(length):
    A, x, h, reset = (z if z.ndim == 2 and z.shape[1] == X else z[:, :length] for z in make("real"))
    want_BTX, want_BX = in_numpy(A, x, h, reset)
    for impl in ("associative", "chunk", "auto"):
        h_BTX, h_BX = ops.affine_scan(A, x, h, reset, impl=impl, chunk=CHUNK)
        np.testing.assert_allclose(h_BTX, want_BTX, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(h_BX, want_BX, rtol=1e-5, atol=1e-5)


def test_dtypes_are_float32_at_least():
    A, x, h, _ = make("real")
    half = [jnp.asarray(z, jnp.bfloat16) for z in (A, x, h)]
    assert [z.dtype for z in ops.affine_scan(*half)] == [jnp.float32, jnp.float32]
    assert ops.affine_scan(A.astype(np.complex64), x, h)[0].dtype == jnp.complex64


def test_bad_arguments_are_named():
    A, x, h, reset = make("real")
    with pytest.raises(ValueError, match=r"A_BTXX: expected X = 4 as in x_BTX, got shape \[3, 45, 4, 3\]"):
        ops.affine_scan(A[..., :3], x)
    with pytest.raises(ValueError, match=r"A_BTXX: expected X = 4 as in A_BTXX, got shape \[3, 45, 4, 3\]"):
        ops.affine_scan(A[..., :3])
    with pytest.raises(ValueError, match=r"h_BX: expected B = 3 as in x_BTX, got shape \[2, 4\]"):
        ops.affine_scan(A, x, h[:2])
    with pytest.raises(ValueError, match="reset_BT: expected dtype bool"):
        ops.affine_scan(A, x, h, reset.astype(int))
    with pytest.raises(ValueError, match="T >= 1"):
        ops.affine_scan(A[:, :0], x[:, :0])
    with pytest.raises(ValueError, match="chunk"):
        ops.affine_scan(A, x, chunk=0)
    with pytest.raises(NotImplementedError, match="affine_scan has no form 'newton'"):
        ops.affine_scan(A, x, impl="newton")
