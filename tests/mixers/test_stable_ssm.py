"""Facts of the StableSSM paper, arXiv:2311.14495."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers import stable_ssm

KINDS = ("best", "exp", "softplus", "direct")


def initial(kind="best", width=3, **fields):
    mixer = memzoo.make("stable_ssm", width=width, reparameterisation=kind, **fields)
    return mixer, jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, width)))


@pytest.mark.parametrize("impl", ["scan", "associative", "chunk"])
def test_is_convolution_with_the_released_kernel(impl):
    """K_l = 2 Re(sum_n C (exp(dt A) - 1) / A exp(dt A l)), by FFT in numpy, and D x."""
    T, D, N = 100, 3, 4
    rng = np.random.default_rng(0)
    A = -1 / (rng.standard_normal((D, N)) ** 2 + 0.1) + 1j * rng.uniform(-20, 20, (D, N))
    C = rng.standard_normal((D, N)) + 1j * rng.standard_normal((D, N))
    dt, skip, x = rng.uniform(1e-3, 1e-1, D), rng.standard_normal(D), rng.standard_normal((2, T, D))
    dtA = dt[:, None] * A
    kernel = 2 * np.einsum("dn,tdn->td", C * (np.exp(dtA) - 1) / A, np.exp(dtA * np.arange(T)[:, None, None])).real
    spectrum = np.fft.rfft(kernel, 2 * T, axis=0) * np.fft.rfft(x, 2 * T, axis=1)
    expected = np.fft.irfft(spectrum, axis=1)[:, :T] + skip * x
    arguments = (jnp.asarray(z) for z in (x, A, C, dt, skip, np.zeros((2, D, N), complex)))
    y, _ = jax.jit(stable_ssm.stable_ssm, static_argnums=7)(*arguments, None, impl)
    np.testing.assert_allclose(y, expected, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_initial_memory(kind):
    """Every mode fades at the rate 1/2 and turns at pi n; the steps are log-uniform in [1e-3, 1e-1]."""
    _, params = initial(kind, width=4000, state_size=2)
    p = params["params"]
    np.testing.assert_allclose(stable_ssm.DECAYS[kind](p["w"]), np.full((4000, 2), -0.5), rtol=1e-6)
    np.testing.assert_allclose(p["omega"], np.tile([0, np.pi], (4000, 1)), rtol=1e-6)
    place = (np.sort(p["log_dt"]) - np.log(1e-3)) / np.log(100)
    assert np.abs(place - (np.arange(4000) + 0.5) / 4000).max() < 0.03
    np.testing.assert_allclose(np.var(p["C"]), 0.5, rtol=0.1)


def test_best_is_stable_for_all_weights():
    w = jnp.concatenate([jnp.linspace(-1e3, 1e3, 1001), jnp.asarray([0.0, 1e-30, 1e6, -1e6])])
    decay = stable_ssm.DECAYS["best"](w)
    assert jnp.all(decay < 0) and jnp.all(decay >= -10)


def gradient_over_weight(kind, decay):
    """Of the response to a constant input, which is -1 / f(w) at last, by automatic differentiation of the model."""
    inverse = {"best": np.sqrt(-1 / decay - 0.1), "exp": np.log(-decay), "softplus": np.log(np.expm1(-decay))}
    w = inverse.get(kind, decay)

    def response(w):
        A = jax.lax.complex(stable_ssm.DECAYS[kind](w), jnp.zeros_like(w)).reshape(1, 1)
        arguments = jnp.ones((1, 20_000, 1)), A, jnp.full((1, 1), 0.5 + 0j), jnp.ones(1), jnp.zeros(1)
        return stable_ssm.stable_ssm(*arguments, jnp.zeros((1, 1, 1), complex), None)[0][0, -1, 0]

    value, gradient = jax.jit(jax.value_and_grad(response))(jnp.float32(w))
    np.testing.assert_allclose(value, -1 / decay, rtol=1e-3)
    return abs(float(gradient) / w)


def test_the_gradient_over_weight_is_bounded_for_best_alone():
    """|f'(w)| / (f(w)^2 |w|): 2 for 'best'; e^-w / |w| for 'exp', and |w|^-3 for 'direct', as memory gets longer."""
    decays = (-0.5, -0.03, -0.001)
    np.testing.assert_allclose([gradient_over_weight("best", f) for f in decays], [2, 2, 2], rtol=2e-3)
    exp = [1 / -f / -np.log(-f) for f in decays]
    np.testing.assert_allclose([gradient_over_weight("exp", f) for f in decays], exp, rtol=2e-3)
    direct = [1 / -(f**3) for f in decays]
    np.testing.assert_allclose([gradient_over_weight("direct", f) for f in decays], direct, rtol=2e-3)
    softplus = [gradient_over_weight("softplus", f) for f in decays]
    assert softplus[2] > 20 * softplus[0]


def test_other_names_are_refused():
    with pytest.raises(
        ValueError, match=r"reparameterisation: expected one of best, exp, .* got 'bset'; did you mean best"
    ):
        memzoo.make("stable_ssm", width=2, reparameterisation="bset")
    with pytest.raises(ValueError, match="dt_min"):
        memzoo.make("stable_ssm", width=2, dt_min=0.1, dt_max=0.01)
    with pytest.raises(ValueError, match="state_size"):
        memzoo.make("stable_ssm", width=2, state_size=0)
