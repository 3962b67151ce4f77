"""Titans MAG, arXiv:2501.00663, eq. 26-28: attention over a window, gated by the memory beside it."""

import jax
import numpy as np

import memzoo
from memzoo.models.titans_mag import TitansMAG
from tests.window import drawn, rms_norm, sigmoid, swiglu, window_layer

B, T, D, Z, W = 2, 9, 12, 11, 3
MEMORY = {"heads": 3, "chunk": 2}
MODEL = TitansMAG(Z, D, 1, heads=2, window=W, persistent=2, hidden=7, memory=MEMORY, impl="scan")


def test_is_the_window_gated_by_the_memory():
    """The memory is the mixer, and the rest in NumPy. Both have the same persistent tokens."""
    tokens = np.random.default_rng(0).integers(0, Z, (B, T))
    params = drawn(MODEL, 0.25)
    run = jax.jit(MODEL.apply)
    got, _ = run(params, tokens)
    p = jax.tree.map(np.float64, params["params"])
    layer = p["block_0"]["layer"]
    x_BTD = p["embedding"][tokens]
    u_BTD = rms_norm(x_BTD, layer["norm"])
    memory = memzoo.make("titans", width=D, persistent=2, impl="scan", **MEMORY)
    m_BTD, _ = jax.jit(memory.apply)({"params": params["params"]["block_0"]["layer"]["memory"]}, np.float32(u_BTD))

    def logits(gate_BTD):
        want = []
        for row in range(B):
            y_TD = window_layer(layer["attention"], u_BTD[row], layer["memory"]["persistent"], W)
            x_TD = x_BTD[row] + rms_norm(y_TD, layer["gate"]["attended"]) * gate_BTD[row]
            x_TD = x_TD + swiglu(rms_norm(x_TD, p["block_0"]["mlp_norm"]), p["block_0"]["mlp"])
            want.append(rms_norm(x_TD, p["norm"]) @ p["head"])
        return np.stack(want)

    want = logits(sigmoid(rms_norm(np.float64(m_BTD), layer["gate"]["remembered"])))
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())

    # A gate that does not look at the memory leaves attention alone.
    scale = params["params"]["block_0"]["layer"]["gate"]["remembered"]["scale"]
    deaf = jax.tree.map(lambda leaf: 0 * leaf if leaf is scale else leaf, params)
    want = logits(np.full_like(u_BTD, 0.5))
    np.testing.assert_allclose(run(deaf, tokens)[0], want, atol=1e-4 * np.abs(want).max())
