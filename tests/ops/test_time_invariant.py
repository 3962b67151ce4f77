"""The time-invariant systems: every form against a loop over tokens, and what the convolution promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memzoo.ops.time_invariant import FORMS, convolve, kernel, kernel_length, strides, time_invariant

B, H, N = 2, 3, 5
KINDS = ("dense", "diagonal")
FAST = ("associative", "conv")


def system(kind, T, seed=0):
    """Stable, with some memories that last, and, if diagonal, complex."""
    rng = np.random.default_rng(seed)
    if kind == "dense":
        A = rng.standard_normal((H, N, N))
        A = A / np.abs(np.linalg.eigvals(A)).max(-1)[:, None, None] * np.array([0.999, 0.9, 0.3])[:, None, None]
        draw = lambda *shape: rng.standard_normal(shape)
    else:
        A = rng.uniform(0.1, 0.999, (H, N)) * np.exp(2j * np.pi * rng.uniform(size=(H, N)))
        draw = lambda *shape: rng.standard_normal(shape) + 1j * rng.standard_normal(shape)
    return rng.standard_normal((B, T, H)), A, draw(H, N), draw(H, N), draw(B, H, N)


def resets(T):
    reset = np.zeros((B, T), bool)
    reset[0, [0, T // 3, (T - 1) // 3 + 1 - (T == 1)]] = reset[1, [T // 2, T - 1]] = True
    return reset


def by_hand(u, A, B_, C, h, reset):
    y, h = np.zeros(u.shape), np.array(h)
    for b in range(B):
        for t in range(u.shape[1]):
            if reset is not None and reset[b, t]:
                h[b] = 0
            for i in range(H):
                h[b, i] = (A[i] @ h[b, i] if A.ndim == 3 else A[i] * h[b, i]) + B_[i] * u[b, t, i]
                y[b, t, i] = np.real(C[i] @ h[b, i])
    return y, h


@functools.partial(jax.jit, static_argnames=("impl", "chunk"))
def run(u, A, B_, C, h, reset, impl, chunk=8):
    return time_invariant(u, A, B_, C, h, reset, impl=impl, chunk=chunk)


@functools.partial(jax.jit, static_argnames=("impl", "chunk"))
def gradients(arrays, reset, weights, impl, chunk=8):
    def loss(u, A, B_, C, h):
        y, h = time_invariant(u, A, B_, C, h, reset, impl=impl, chunk=chunk)
        return jnp.sum(y * weights[0]) + jnp.sum(jnp.real(h * weights[1]))

    return jax.grad(loss, argnums=(0, 1, 2, 3, 4))(*arrays)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 8, 27])
@pytest.mark.cases(1)
def test_forms_are_the_loop(kind, T, cut):
    arrays, reset = system(kind, T), resets(T) if cut else None
    want_y, want_h = by_hand(*arrays, reset)
    with jax.enable_x64(True):
        for impl in FORMS:
            y, h = run(*map(jnp.asarray, arrays), reset, impl)
            assert y.dtype == jnp.float64
            np.testing.assert_allclose(y, want_y, atol=1e-11 * np.abs(want_y).max(), err_msg=impl)
            np.testing.assert_allclose(h, want_h, atol=1e-11 * np.abs(want_h).max(), err_msg=impl)
    arrays = [jnp.asarray(a, jnp.complex64 if np.iscomplexobj(a) else jnp.float32) for a in arrays]
    for impl in FORMS if T == 27 else ():
        y, h = run(*arrays, reset, impl)
        assert y.dtype == jnp.float32
        np.testing.assert_allclose(y, want_y, atol=3e-5 * np.abs(want_y).max(), err_msg=impl)
        np.testing.assert_allclose(h, want_h, atol=3e-5 * np.abs(want_h).max(), err_msg=impl)


@pytest.mark.long
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", FAST)
def test_gradients_are_those_of_the_definition(kind, impl, cut):
    T = 27
    arrays, reset = system(kind, T), resets(T) if cut else None
    rng = np.random.default_rng(3)
    weights = rng.standard_normal((B, T, H)), rng.standard_normal((B, H, N))
    with jax.enable_x64(True):
        arrays = tuple(map(jnp.asarray, arrays))
        want, got = (gradients(arrays, reset, weights, form) for form in ("scan", impl))
        for g, w in zip(got, want, strict=True):
            np.testing.assert_allclose(g, w, atol=1e-11 * np.abs(w).max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("L", [1, 2, 37])
def test_kernel(kind, L):
    _, A, B_, C, _ = system(kind, 1)
    powers = [np.eye(N)[None] * np.ones((H, 1, 1)) if kind == "dense" else np.ones_like(A)]
    for _ in range(L - 1):
        powers.append(A @ powers[-1] if kind == "dense" else A * powers[-1])
    equation = "hn,thnm,hm->ht" if kind == "dense" else "hn,thn,hn->ht"
    want = np.real(np.einsum(equation, C, np.stack(powers), B_))
    with jax.enable_x64(True):
        np.testing.assert_allclose(kernel(*map(jnp.asarray, (A, B_, C)), L), want, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("stride", "n"), [(1, 3), (8, 1), (8, 5)])
def test_strides(kind, stride, n):
    _, A, B_, *_ = system(kind, 1)
    want = [B_]
    for _ in range((n - 1) * stride):
        want.append(np.einsum("hnm,hm->hn", A, want[-1]) if kind == "dense" else A * want[-1])
    with jax.enable_x64(True):
        np.testing.assert_allclose(strides(jnp.asarray(A), jnp.asarray(B_), stride, n), want[::stride], atol=1e-12)


def test_convolve_wraps_nothing_around():
    rng = np.random.default_rng(0)
    u, k = rng.standard_normal((2, 9, 3)), rng.standard_normal((3, 12))
    want = np.stack([[np.convolve(u[b, :, i], k[i])[:9] for i in range(3)] for b in range(2)])
    for length in (12, 9):
        got = convolve(jnp.asarray(u, jnp.float32), jnp.asarray(k[:, :length], jnp.float32))
        np.testing.assert_allclose(got, np.swapaxes(want, 1, 2), atol=1e-5)


@pytest.mark.long
def test_a_given_kernel_is_used():
    u, A, B_, C, h = (jnp.asarray(a, jnp.float32) for a in system("dense", 20))
    for reset in (None, jnp.asarray(resets(20))):
        least = kernel_length(20, reset, 8)
        k = kernel(A, B_, C, least)
        want, _ = time_invariant(u, A, B_, C, 0 * h, reset, impl="conv", chunk=8)
        got, _ = time_invariant(u, A, B_, C, 0 * h, reset, impl="conv", chunk=8, kernel_HL=k)
        np.testing.assert_allclose(got, want, atol=1e-5)
        with pytest.raises(ValueError, match=f"kernel_HL: expected a length L >= {least}"):
            time_invariant(u, A, B_, C, h, reset, impl="conv", chunk=8, kernel_HL=k[:, 1:])


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.cases(1)
def test_nan_does_not_cross_a_reset(impl):
    u, A, B_, C, h = (jnp.asarray(a, jnp.float32) for a in system("dense", 20))
    first = jnp.zeros((B, 20), bool).at[:, 0].set(True)
    y, last = run(u, A, B_, C, jnp.full_like(h, jnp.nan), first, impl)
    clean_y, clean = run(u, A, B_, C, h * 0, first, impl)
    np.testing.assert_array_equal(y, clean_y)
    np.testing.assert_array_equal(last, clean)
    weights = jnp.ones_like(u), jnp.ones_like(h)
    for leaf in gradients((u, A, B_, C, jnp.full_like(h, jnp.nan)), first, weights, impl):
        assert jnp.isfinite(leaf).all()


def test_bad_arguments_are_named():
    u, A, B_, C, h = (jnp.asarray(a, jnp.float32) for a in system("dense", 4))
    with pytest.raises(ValueError, match="C_HN: expected N = 5 as in B_HN"):
        time_invariant(u, A, B_, C[:, 1:], h)
    with pytest.raises(ValueError, match="A_HNN: expected H = 3 as in u_BTH"):
        time_invariant(u, A[1:], B_, C, h)
    with pytest.raises(ValueError, match="reset_BT: expected dtype bool"):
        time_invariant(u, A, B_, C, h, jnp.zeros((B, 4)))
    with pytest.raises(NotImplementedError, match="time_invariant has no form 'chunk'"):
        time_invariant(u, A, B_, C, h, impl="chunk")
