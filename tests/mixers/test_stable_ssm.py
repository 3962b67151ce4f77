"""Facts of the StableSSM paper, arXiv:2311.14495."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import memzoo
from memzoo.mixers import stable_ssm

KINDS = ("best", "exp", "softplus", "direct")


def initial(kind="best", width=3, **fields):
    mixer = memzoo.make("stable_ssm", width=width, reparameterisation=kind, **fields)
    return mixer, jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, width)))


@pytest.mark.parametrize("impl", ["scan", "associative", "chunk"])
@pytest.mark.cases(2)
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
@pytest.mark.cases(1)
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


def decays(kind, w):
    """The paper's table, of which `direct` is without a reparameterisation."""
    return {"best": -1 / (w**2 + 0.1), "exp": -np.exp(w), "softplus": -np.log(1 + np.exp(w)), "direct": w}[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.cases(1)
def test_an_impulse_shows_the_kernel_of_each_kind(kind):
    """Of the layer: 2 Re(sum_n C (exp(dt A) - 1) / A exp(dt A l)) at l, D at 0, through gelu and GLU."""
    D, N, T = 2, 3, 40
    mixer, params = initial(kind, width=D, state_size=N)
    rng = np.random.default_rng(0)
    w = rng.uniform(0.3, 1.5, (D, N)) * (-1 if kind == "direct" else 1)
    params["params"] |= {"w": jnp.float32(w), "log_dt": jnp.log(jnp.asarray([0.5, 0.1]))}
    p = jax.tree.map(np.float64, params["params"])
    x = np.zeros((D, T, D), np.float32)
    x[range(D), 0, range(D)] = 1  # one row for each feature
    A, dt, C = decays(kind, w) + 1j * p["omega"], np.exp(p["log_dt"])[:, None], p["C"][:, :N] + 1j * p["C"][:, N:]
    kernel = (
        2 * np.einsum("dn,tdn->dt", C * (np.exp(dt * A) - 1) / A, np.exp(dt * A * np.arange(T)[:, None, None])).real
    )
    kernel[:, 0] += p["D"]
    y = np.einsum("dt,de->dte", kernel, np.eye(D))
    gelu = y / 2 * (1 + scipy.special.erf(y / 2**0.5))
    a, b = np.split(gelu @ p["out"]["kernel"] + p["out"]["bias"], 2, axis=-1)
    np.testing.assert_allclose(jax.jit(mixer.apply)(params, x)[0], a / (1 + np.exp(-b)), atol=1e-5)


def gradients_over_weight(kind, decays):
    """Of the layer's response to a constant input, which is -10 / f(w) at last: gelu(y) = y for such y, GLU is open."""
    f = np.array(decays)
    inverse = {"best": np.sqrt(-1 / f - 0.1), "exp": np.log(-f), "softplus": np.log(np.expm1(-f)), "direct": f}
    mixer, params = initial(kind, width=1, state_size=1)
    params["params"] |= {
        "C": jnp.asarray([[5.0, 0.0]]),
        "D": jnp.zeros(1),
        "log_dt": jnp.full(1, np.log(10)),  # as exact as any
        "out": {"kernel": jnp.asarray([[1.0, 0.0]]), "bias": jnp.asarray([0.0, 100.0])},
    }

    @jax.jit
    @jax.value_and_grad
    def response(w):
        y_BTD, _ = mixer.apply({"params": params["params"] | {"w": w.reshape(1, 1)}}, jnp.ones((1, 2000, 1)))
        return y_BTD[0, -1, 0] / 10

    w = inverse[kind]
    values, gradients = zip(*(response(np.float32(each)) for each in w), strict=True)
    np.testing.assert_allclose(values, -1 / f, rtol=1e-3)
    return np.abs(np.array(gradients) / w)


@pytest.mark.long
def test_the_gradient_over_weight_is_bounded_for_best_alone():
    """|f'(w)| / (f(w)^2 |w|): 2 for 'best'; e^-w / |w| for 'exp', and |w|^-3 for 'direct', as memory gets longer."""
    decays = (-0.5, -0.03, -0.001)
    np.testing.assert_allclose(gradients_over_weight("best", decays), [2, 2, 2], rtol=2e-3)
    exp = [1 / -f / -np.log(-f) for f in decays]
    np.testing.assert_allclose(gradients_over_weight("exp", decays), exp, rtol=2e-3)
    direct = [1 / -(f**3) for f in decays]
    np.testing.assert_allclose(gradients_over_weight("direct", decays), direct, rtol=2e-3)
    softplus = gradients_over_weight("softplus", decays)
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
