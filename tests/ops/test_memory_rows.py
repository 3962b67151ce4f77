"""Rows that forget each by itself: reads of a chunk as sums over pairs, and its matrices one by one or all together.

Dims: C chunk, I inputs, O outputs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memzoo.ops import Rule, memory_rows

I, O = 3, 6


def kept(rng, C):
    """Some rows forget everything now and then, some nothing."""
    return np.where(rng.uniform(size=(C, O)) < 0.2, rng.integers(0, 2, (C, O)), rng.uniform(size=(C, O)))


def written_out(x_CI, z_CI, w_CO, keep_CO):
    y_CO = np.zeros_like(w_CO)
    for t in range(len(x_CI)):
        for z in range(t + 1):
            y_CO[t] += x_CI[t] @ z_CI[z] * np.prod(keep_CO[z + 1 : t + 1], axis=0) * w_CO[z]
    return y_CO


@pytest.mark.parametrize("C", [1, 3, 4, 10, 37])
@pytest.mark.cases(2)
def test_reads_are_sums_over_pairs_of_what_has_not_decayed(C):
    rng = np.random.default_rng(C)
    x_CI, z_CI, w_CO, keep_CO = rng.normal(size=(C, I)), rng.normal(size=(C, I)), rng.normal(size=(C, O)), kept(rng, C)
    with jax.enable_x64(True):

        def run(*told):
            d = memory_rows.decays(told[-1])
            return memory_rows.reads(*told[:-1], d), d

        (y_CO, d), pull = jax.vjp(jax.jit(run), *map(jnp.asarray, (x_CI, z_CI, w_CO, keep_CO)))
        np.testing.assert_allclose(y_CO, written_out(x_CI, z_CI, w_CO, keep_CO), atol=1e-12)
        np.testing.assert_allclose(d.since_CR, np.cumprod(keep_CO, axis=0), atol=1e-12)
        until_CO = [np.prod(keep_CO[z + 1 :], axis=0) for z in range(C)]
        np.testing.assert_allclose(d.until_CR, until_CO, atol=1e-12)

        weights_CO = rng.normal(size=(C, O))
        found = pull((jnp.asarray(weights_CO), jax.tree.map(jnp.zeros_like, d)))
        along = [rng.normal(size=x.shape) for x in (x_CI, z_CI, w_CO, keep_CO)]
        moved = lambda e: written_out(*(x + e * a for x, a in zip((x_CI, z_CI, w_CO, keep_CO), along, strict=True)))
        quotient = np.sum(weights_CO * (moved(1e-6) - moved(-1e-6))) / 2e-6
        np.testing.assert_allclose(sum(np.sum(g * a) for g, a in zip(found, along, strict=True)), quotient, rtol=1e-6)


def test_matrices_one_by_one_are_those_all_together():
    C, rng = 7, np.random.default_rng(0)
    A, A0 = ({"W": rng.normal(size=(O, I))} for _ in range(2))
    keep_CO = kept(rng, C)
    begin_CO = np.where(np.arange(C)[:, None] == 4, 0.5, 0.0) * np.ones(O)
    do = np.where(begin_CO > 0, 0, keep_CO), begin_CO, None, rng.uniform(size=C)
    known = {"W": (rng.normal(size=(C, O)), rng.normal(size=(C, I)))}
    memory = lambda apply, x_TI, _: jnp.sin(apply("W", x_TI))

    def loss(one_by_one, *told):
        A, y_CO = memory_rows.formed(memory, Rule(weights=jnp.tanh), None, *told, one_by_one)
        return jnp.sum(jnp.cos(y_CO)) + jnp.sum(jnp.sin(A["W"])), (A, y_CO)

    with jax.enable_x64(True):
        told = A, A0, known, rng.normal(size=(C, I)), do
        both = [
            jax.jit(jax.grad(loss, argnums=range(1, 6), has_aux=True), static_argnums=0)(way, *told)
            for way in (True, False)
        ]
        jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-12), *both)
        now_OI = A["W"]
        for t in range(C):
            delta_CO, x_CI = known["W"]
            now_OI = begin_CO[t][:, None] * A0["W"] + do[0][t][:, None] * now_OI
            now_OI = now_OI - do[3][t] * np.outer(delta_CO[t], x_CI[t])
            np.testing.assert_allclose(both[0][1][1][t], np.sin(np.tanh(now_OI) @ told[3][t]), atol=1e-12)
        np.testing.assert_allclose(both[0][1][0]["W"], now_OI, atol=1e-12)
