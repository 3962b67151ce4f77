"""Newton's method is the loop: over thousands of tokens, in both precisions, as initialised and trained on parity.

Left out by default, for its time: `python -m pytest -m long` runs it.

Dims: B batch, T time, D width.
"""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memzoo
from tests.test_contract import D, assert_close, in_numpy, make

B = 2
NAMES = [name for name in memzoo.names() if "newton" in memzoo.card(name).forms]
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
LENGTH = {"hippo": 512}  # it forgets nothing and takes the more iterations the longer it is: 8 minutes at 4,096


def everything(name, impl, params, x_BTD):
    """Output, state, and the gradients of a loss of both with respect to parameters and input."""
    mixer = make(name, impl, x_BTD.dtype)

    def loss(params, x_BTD):
        y_BTD, state = mixer.apply(params, x_BTD)
        return jnp.mean(jnp.sin(3 * y_BTD)) + sum(jnp.mean(s) for s in jax.tree.leaves(state)), (y_BTD, state)

    return in_numpy(jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x_BTD))


@pytest.mark.long
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", NAMES)
def test_newton_is_the_loop_over_many_tokens(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        x_BTD = np.random.default_rng(0).normal(size=(B, LENGTH.get(name, 4096), D)).astype(dtype)
        params = jax.jit(make(name, "scan", x_BTD.dtype).init)(jax.random.key(0), x_BTD[:, :1])
        want = everything(name, "scan", params, x_BTD)
        assert_close(everything(name, "newton", params, x_BTD), want, TOLERANCE[dtype])


def parity(T, seed=0):
    """(x_BTD, whether the number of ones up to each token is odd)."""
    bits_BT = np.random.default_rng(seed).integers(0, 2, (64, T))
    x_BTD = np.stack([bits_BT, 1 - bits_BT, *np.zeros((D - 2, 64, T))], axis=-1)
    return x_BTD.astype("float32"), np.cumsum(bits_BT, axis=1) % 2


@pytest.mark.long
@pytest.mark.parametrize("name", ["elman", "lstm", "gru"])
def test_newton_is_the_loop_after_training_on_parity(name):
    """300 steps at 12 tokens, after which the Jacobians of some tokens expand."""
    mixer, (x_BTD, odd_BT) = make(name, "scan"), parity(12)
    params = jax.jit(mixer.init)(jax.random.key(0), x_BTD[:, :1])
    optimiser = optax.adam(1e-2)

    def loss(params):
        y_BTD, _ = mixer.apply(params, x_BTD)
        return jnp.mean(optax.sigmoid_binary_cross_entropy(4 * y_BTD[..., 0], odd_BT))

    @jax.jit
    def train(params):
        def update(carry, _):
            params, moments = carry
            value, gradient = jax.value_and_grad(loss)(params)
            change, moments = optimiser.update(gradient, moments)
            return (optax.apply_updates(params, change), moments), value

        return jax.lax.scan(update, (params, optimiser.init(params)), length=300)

    (params, _), values = train(params)
    assert values[-1] < 0.9 * values[0]
    x_BTD = parity(512, seed=1)[0][:B]
    assert max(expansions(mixer, params, x_BTD[:1, :60])) > 1
    want = everything(name, "scan", params, x_BTD)
    assert_close(everything(name, "newton", params, x_BTD), want, TOLERANCE["float32"])


def expansions(mixer, params, x_1TD):
    """The largest singular value of each token's Jacobian, of the state after it with respect to that before."""
    flat, back = jax.flatten_util.ravel_pytree(mixer.initial_state(1))

    def token(state, x_1D):
        after = lambda state: jax.flatten_util.ravel_pytree(mixer.apply(params, x_1D[:, None], back(state))[1])[0]
        return after(state), jnp.linalg.norm(jax.jacobian(after)(state), 2)

    return jax.jit(lambda x_T1D: jax.lax.scan(token, flat, x_T1D)[1])(np.swapaxes(x_1TD, 0, 1))
