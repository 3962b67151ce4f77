"""diagonal_ssm against its equation and its kernel in numpy, in every form."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from memzoo import ops

B, T, D, N = 2, 45, 3, 4
CHUNK = 8
FORMS = {"scan": {}, "associative": {}, "chunk": {"chunk": CHUNK}}


def make(slowest=1.0):
    """Arguments, a state to begin with, and resets: first token, last token, two in a chunk, two in a row."""
    rng = np.random.default_rng(0)
    n = lambda *shape: rng.standard_normal(shape) + 1j * rng.standard_normal(shape)
    eigenvalue = slowest * rng.uniform(0.01, 1, (D, N)) ** 0.1 * np.exp(1j * rng.uniform(0, 6.28, (D, N)))
    reset_BT = np.zeros((B, T), bool)
    reset_BT[0, [0, 7, 8]] = reset_BT[1, [20, 22, T - 1]] = True
    return rng.standard_normal((B, T, D)), eigenvalue, n(D, N), n(D, N), n(B, D, N), reset_BT


def in_numpy(x, eigenvalue, b, c, h, reset):
    y, h = np.zeros(x.shape), h.copy()
    for t in range(x.shape[1]):
        h = eigenvalue * np.where(reset[:, t, None, None], 0, h) + b * x[:, t, :, None]
        y[:, t] = np.sum(c * h, -1).real
    return y, h


def run(impl):
    def loss(arrays, reset, w_BTD, w_BDN):
        y, h = ops.diagonal_ssm(*arrays, reset, impl=impl, **FORMS[impl])
        return jnp.sum(y * w_BTD) + jnp.sum(jnp.real(h * w_BDN)), (y, h)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


RUN = {impl: run(impl) for impl in FORMS}


@pytest.mark.parametrize("resets", (False, True))
@pytest.mark.parametrize("x64", (False, True), ids=("float32", "float64"))
@pytest.mark.cases(1)
def test_forms_agree_with_the_equation(x64, resets):
    tolerance = 1e-10 if x64 else 1e-5
    with jax.enable_x64(x64):
        *arrays, reset = make()
        want = in_numpy(*arrays, reset & resets)
        rng = np.random.default_rng(1)
        w = [jnp.asarray(rng.standard_normal(s)) for s in ((B, T, D), (B, D, N))]
        arrays = [jnp.asarray(a) for a in arrays]
        reset = jnp.asarray(reset) if resets else None
        (_, _), gradients = RUN["scan"](arrays, reset, *w)
        for impl in FORMS:
            (_, got), d = RUN[impl](arrays, reset, *w)
            for a, b in [*zip(got, want, strict=True), *zip(d, gradients, strict=True)]:
                assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), impl


@pytest.mark.parametrize("impl", FORMS)
def test_is_convolution_with_its_kernel(impl):
    """By FFT, in numpy: y = K * x, K_t = Re(sum_n c_n lambda_n^t b_n)."""
    x, eigenvalue, b, c, *_ = make(0.95)
    kernel = np.einsum("dn,tdn,dn->td", c, eigenvalue ** np.arange(T)[:, None, None], b).real
    spectrum = np.fft.rfft(kernel, 2 * T, axis=0) * np.fft.rfft(x, 2 * T, axis=1)
    y, _ = ops.diagonal_ssm(*(jnp.asarray(a) for a in (x, eigenvalue, b, c)), impl=impl, **FORMS[impl])
    np.testing.assert_allclose(y, np.fft.irfft(spectrum, axis=1)[:, :T], atol=1e-4)


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.cases(1)
def test_pieces_equal_the_whole(impl):
    *arrays, h, reset = make()
    x, *system = (jnp.asarray(a) for a in arrays)
    op = jax.jit(lambda x, h, reset: ops.diagonal_ssm(x, *system, h, reset, impl=impl, **FORMS[impl]))
    y, last = op(x, jnp.asarray(h), jnp.asarray(reset))
    pieces, state = [], jnp.asarray(h)
    for i, j in itertools.pairwise((0, 1, 3, 17, T)):
        piece, state = op(x[:, i:j], state, jnp.asarray(reset[:, i:j]))
        pieces.append(piece)
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), y, atol=2e-4)
    np.testing.assert_allclose(state, last, atol=2e-4)


@pytest.mark.parametrize("impl", FORMS)
def test_nan_in_the_state_does_not_cross_a_reset_at_the_first_token(impl):
    *arrays, h, _ = make()
    first = np.arange(T)[None].repeat(B, 0) == 0
    arrays = [jnp.asarray(a) for a in arrays]
    w = jnp.ones((B, T, D)), jnp.ones((B, D, N))
    clean = RUN[impl]([*arrays, jnp.zeros(h.shape, complex)], jnp.asarray(first), *w)
    dirty = RUN[impl]([*arrays, jnp.full(h.shape, jnp.nan, complex)], jnp.asarray(first), *w)
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)


def test_gradient_with_resets_keeps_no_copies():
    """Neither of x for each lag, nor of the states: the chunked form's memory grows with B T D alone."""
    args = [jax.ShapeDtypeStruct(s, t) for s, t in [((1, 4096, 8), "f4"), *[((8, 32), "c8")] * 3, ((1, 8, 32), "c8")]]
    reset = jax.ShapeDtypeStruct((1, 4096), bool)

    def loss(x, eigenvalue, b, c, h, reset):
        return jnp.sum(ops.diagonal_ssm(x, eigenvalue, b, c, h, reset, impl="chunk")[0] ** 2)

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(*args, reset).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 40 * 4 * 4096 * 8, "x itself is 4 * 4096 * 8 bytes"


def test_zero_order_hold_is_exact_near_0_too():
    A = np.asarray([0, -1e-4, -0.5 + 3j, -1e4, 1e-3j])
    at, held = jax.jit(ops.zero_order_hold)(jnp.asarray(A), 1e-2)
    np.testing.assert_allclose(at, np.exp(1e-2 * A), rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose(held[0], 1e-2, rtol=1e-6)
    np.testing.assert_allclose(held[1:], (np.expm1(1e-2 * A) / np.where(A == 0, 1, A))[1:], rtol=1e-6)
    derivative = jax.grad(lambda a: ops.zero_order_hold(lax.complex(a, 0.0), 1e-2)[1].real)
    np.testing.assert_allclose([derivative(0.0), derivative(-1e-3)], [0.5e-4, 0.5e-4], rtol=1e-4)  # dt^2 / 2


def test_bad_arguments_are_named():
    x, eigenvalue, b, c, *_ = make()
    with pytest.raises(ValueError, match=r"b_DN: expected D = 3 as in x_BTD"):
        ops.diagonal_ssm(x, eigenvalue, b[:2], c)
    with pytest.raises(ValueError, match="chunk: expected an integer >= 1, got 0"):
        ops.diagonal_ssm(x, eigenvalue, b, c, chunk=0)
    with pytest.raises(NotImplementedError, match="impl: diagonal_ssm has no form 'newton'"):
        ops.diagonal_ssm(x, eigenvalue, b, c, impl="newton")
