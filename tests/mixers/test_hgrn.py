"""Facts of the HGRN paper, arXiv:2311.04823."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers import hgrn


@pytest.mark.parametrize("impl", ["scan", "associative", "chunk"])
def test_is_two_real_recurrences_that_rotate_into_each_other(impl):
    """The released kernel's arithmetic, on real and imaginary parts, token by token."""
    rng = np.random.default_rng(0)
    f, c = rng.uniform(0.2, 1, (2, 70, 5)), rng.normal(size=(2, 70, 5)) + 1j * rng.normal(size=(2, 70, 5))
    h, theta = rng.normal(size=(2, 5)) + 1j * rng.normal(size=(2, 5)), rng.uniform(0, 6, 5)
    real, imag, want = h.real, h.imag, []
    for t in range(70):
        a, b = f[:, t] * np.cos(theta), f[:, t] * np.sin(theta)
        write = (1 - f[:, t]) * c[:, t]
        real, imag = a * real - b * imag + write.real, a * imag + b * real + write.imag
        want.append(real + 1j * imag)
    f, theta, c, h = jnp.float32(f), jnp.float32(theta), jnp.complex64(c), jnp.complex64(h)
    h_BTN, _ = jax.jit(hgrn.hgru, static_argnums=5)(f, c, theta, h, None, impl)
    np.testing.assert_allclose(h_BTN, np.stack(want, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lower_bound", (0.0, 0.75))
@pytest.mark.cases(1)
def test_no_input_forgets_faster_than_the_bound(lower_bound):
    """What an earlier token left fades by at least the bound per token, and never grows."""
    mixer = memzoo.make("hgrn", width=6, lower_bound=lower_bound)
    x_BTD = 20 * jax.random.normal(jax.random.key(1), (4, 9, 6))  # gates as extreme as they get
    params = mixer.init(jax.random.key(0), x_BTD)
    run = jax.jit(mixer.apply)
    state = hgrn.State(jnp.full((4, 6), 1 + 2j, jnp.complex64))
    trace = run(params, x_BTD, state)[1].h_BN - run(params, x_BTD)[1].h_BN
    left = np.abs(trace) / np.sqrt(5)
    assert (left <= 1 + 1e-4).all() and (left >= lower_bound**9 * (1 - 1e-3)).all()
    assert left.min() < 0.01 or lower_bound > 0


def test_the_state_is_a_mean_of_what_was_written():
    """Input and forget gate are tied, so |h| never exceeds the largest |c|, and a constant stays a constant."""
    rng = np.random.default_rng(0)
    f = jnp.asarray(rng.uniform(size=(1, 300, 4)), jnp.float32)
    c = jnp.asarray(rng.normal(size=(1, 300, 4)) + 1j * rng.normal(size=(1, 300, 4)), jnp.complex64)
    zero = jnp.zeros((1, 4), jnp.complex64)
    h_BTN, _ = hgrn.hgru(f, c, jnp.asarray(rng.uniform(0, 6, 4), jnp.float32), zero, None)
    assert jnp.abs(h_BTN).max() <= jnp.abs(c).max()
    same, _ = hgrn.hgru(f, 0 * c + 2j, jnp.zeros(4), zero + 2j, None)
    np.testing.assert_allclose(same, 2j * np.ones((1, 300, 4)), rtol=1e-5)


@pytest.mark.long
def test_initial_turns_and_gates():
    """theta runs from 1 to nearly 10000^-2 in equal ratios. Weights and biases are uniform in +-1/sqrt(inputs), so that
    forget gates are sigmoids of logits of variance 1/3, close about the middle of [lower_bound, 1]."""
    mixer = memzoo.make("hgrn", width=64, lower_bound=0.5)
    x_BTD = jax.random.normal(jax.random.key(1), (1, 50, 64))
    p = mixer.init(jax.random.key(0), x_BTD)["params"]
    np.testing.assert_allclose(p["theta"], np.logspace(0, -8 * 63 / 64, 64), rtol=1e-5)
    for layer, inputs in (("forget", 64), ("in", 64), ("gate", 64), ("out", 128)):
        for weights in p[layer].values():
            assert 0.9 * inputs**-0.5 < np.abs(weights).max() <= inputs**-0.5
            np.testing.assert_allclose(np.std(weights), (3 * inputs) ** -0.5, rtol=0.2)
    logit = np.asarray(x_BTD[0] @ p["forget"]["kernel"] + p["forget"]["bias"])
    assert abs(np.std(logit) - (1 / 3 + 1 / 192) ** 0.5) < 0.04
    f = 0.5 + 0.5 / (1 + np.exp(-logit))
    assert abs(np.mean(f) - 0.75) < 0.01 and f.min() > 0.5 and 0.62 < np.percentile(f, 5) < 0.66


@pytest.mark.parametrize("bound", (-0.1, 1.0))
def test_a_bound_outside_its_range_is_refused(bound):
    with pytest.raises(ValueError, match=f"lower_bound: expected 0 <= lower_bound < 1, got {bound}"):
        memzoo.make("hgrn", width=6, lower_bound=bound)


@pytest.mark.parametrize("bound", ("a", float("nan"), None))
def test_a_bound_that_is_no_number_is_refused(bound):
    with pytest.raises(ValueError, match=f"lower_bound: expected a finite number, got {bound!r}"):
        memzoo.make("hgrn", width=6, lower_bound=bound)
