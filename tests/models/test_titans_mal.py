"""Titans MAL, arXiv:2501.00663, eq. 29-31: first the memory, then attention over a window."""

import jax
import numpy as np

import memzoo
from memzoo.models.titans_mal import TitansMAL
from tests.window import drawn, rms_norm, swiglu, window_layer

B, T, D, Z, W = 2, 9, 12, 11, 3
MEMORY = {"heads": 3, "chunk": 2}
MODEL = TitansMAL(Z, D, 1, heads=2, window=W, persistent=2, hidden=7, memory=MEMORY, impl="scan")


def test_is_the_memory_and_then_the_window():
    """The memory is the mixer, and the rest in NumPy; without the memory's output, attention alone."""
    tokens = np.random.default_rng(0).integers(0, Z, (B, T))
    params = drawn(MODEL, 0.25)
    mute = jax.tree_util.tree_map_with_path(lambda path, p: 0 * p if "'memory'" in str(path) else p, params)
    run, memory = jax.jit(MODEL.apply), memzoo.make("titans", width=D, persistent=2, impl="scan", **MEMORY)
    remember = jax.jit(memory.apply)
    for given in (params, mute):
        got, _ = run(given, tokens)
        p = jax.tree.map(np.float64, given["params"])
        layer = p["block_0"]["layer"]
        x_BTD = p["embedding"][tokens]
        remembered, _ = remember(
            {"params": given["params"]["block_0"]["layer"]["memory"]},
            np.float32(rms_norm(x_BTD, layer["memory_norm"])),
        )
        for row in range(B):
            x_TD = x_BTD[row] + np.float64(remembered[row])
            u_TD = rms_norm(x_TD, layer["attention_norm"])
            x_TD = x_TD + window_layer(layer["attention"], u_TD, layer["persistent"], W)
            x_TD = x_TD + swiglu(rms_norm(x_TD, p["block_0"]["mlp_norm"]), p["block_0"]["mlp"])
            want = rms_norm(x_TD, p["norm"]) @ p["head"]
            np.testing.assert_allclose(got[row], want, atol=1e-4 * np.abs(want).max())
    assert np.abs(run(params, tokens)[0] - run(mute, tokens)[0]).max() > 1e-2
