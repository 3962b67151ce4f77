"""What a memory descends is the gradient of its objective: each by hand in NumPy, for a matrix and for a network.

Dims: K key, V value, F hidden.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memzoo.mixers import memora, moneta, yaad
from memzoo.ops import Gates, memorize
from memzoo.ops.memory import half_square

K, V, F = 4, 5, 6
RNG = np.random.default_rng(0)
ETA, DELTA = RNG.uniform(0.5, 1, V), RNG.uniform(0.2, 0.8, V)


OBJECTIVES = {  # the objective, what it is told besides the value, and its slope in what is read, for the error e
    "dot product": (lambda y_V, v_V: -jnp.vdot(y_V, v_V), [], None),
    "half square": (half_square, [], lambda e: e),
    "half square of weighted channels": (memora.loss, [ETA], lambda e: ETA * e),
    "p-norm": (partial(moneta.loss, 3.0), [ETA], lambda e: ETA * e * np.sqrt(e**2 + 1e-6)),
    "Huber": (yaad.loss, [ETA, DELTA], lambda e: ETA * np.where(np.abs(e) > DELTA, DELTA * np.sign(e), e)),
}


def matrix(apply, x_TK, _):
    return apply("W", x_TK)


def network(apply, x_TK, _):
    return apply("out", jnp.tanh(apply("in", x_TK)))


def by_hand(A, k_K, v_V, slope):
    """-gradient, {name: matrix}."""
    hidden = np.tanh(A["in"] @ k_K) if "in" in A else k_K
    last = A["out" if "in" in A else "W"]
    dy_V = -v_V if slope is None else slope(last @ hidden - v_V)
    if "in" not in A:
        return {"W": -np.outer(dy_V, k_K)}
    return {"in": -np.outer(last.T @ dy_V * (1 - hidden**2), k_K), "out": -np.outer(dy_V, hidden)}


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (np.float64, 1e-12)])
@pytest.mark.cases(1)
def test_one_token_moves_the_weights_by_minus_the_gradient(dtype, tolerance):
    """In both forms, with a step of 1."""
    rng = np.random.default_rng(1)
    k_K, v_V = rng.normal(size=K), rng.normal(size=V)
    memories = {
        "matrix": (matrix, {"W": rng.normal(size=(V, K)) / 2}),
        "network": (network, {"in": rng.normal(size=(F, K)) / 2, "out": rng.normal(size=(V, F)) / 2}),
    }

    def moved(memory, A, objective, told, impl):
        A, k, v = jax.tree.map(lambda x: jnp.asarray(x, dtype), (A, k_K, np.concatenate([v_V, *told])))
        A = {name: W[None] for name, W in A.items()}
        one = lambda x: x[None, None, None]
        gates = Gates(jnp.ones((1, 1, 1), dtype))
        _, state = memorize(memory, objective, A, one(k), one(k), one(v), gates, chunk=2, impl=impl)
        return {name: W[0, 0] for name, W in state.A.items()}

    @jax.jit
    def everything():
        return {
            (kind, name, impl): moved(memory, A, objective, told, impl)
            for kind, (memory, A) in memories.items()
            for name, (objective, told, _) in OBJECTIVES.items()
            for impl in ("scan", "chunk")
        }

    with jax.enable_x64(dtype == np.float64):
        found = jax.tree.map(np.asarray, everything())
    for (kind, name, impl), got in found.items():
        want = by_hand(memories[kind][1], k_K, v_V, OBJECTIVES[name][2])
        for matrix_name, W in want.items():
            assert got[matrix_name].dtype == dtype
            np.testing.assert_allclose(got[matrix_name], W, atol=tolerance, err_msg=f"{kind}, {name}, {impl}")
