"""Titans MAC, arXiv:2501.00663, eq. 21-25, token by token: what is read before the segment, and what after a write.

Dims: T time, D width, G heads of attention, H heads of the memory, K key, V value, C segment.
"""

import jax
import numpy as np
import pytest

from memzoo.models.titans_mac import TitansMAC
from tests.window import drawn, rms_norm, sigmoid, swiglu, turned

B, T, D, Z, C, N, G, H, K, V = 2, 11, 12, 11, 4, 2, 3, 2, 5, 6
STEP = 0.7
MEMORY = {"heads": H, "key_dim": K, "value_dim": V, "depth": 1, "chunk": 1, "step": STEP}
MODEL = TitansMAC(Z, D, 1, heads=G, segment=C, persistent=N, hidden=7, memory=MEMORY, impl="scan")


@pytest.fixture(scope="module")
def run():
    return jax.jit(MODEL.apply)


def unit(x):
    return x / np.sqrt(np.sum(x**2, -1, keepdims=True) + 1e-6)


def projected(p, x_TD):
    """q, k, v of the memory [T, H, .], after convolution over all T."""
    qkv_TE = x_TD @ p["kernel_told"]
    past_LE = np.concatenate([np.zeros((3, qkv_TE.shape[1])), qkv_TE])
    qkv_TE = sum(f_E * past_LE[w : w + len(x_TD)] for w, f_E in enumerate(p["conv"]))
    q_TE, k_TE, v_TE = np.split(qkv_TE * sigmoid(qkv_TE), [H * K, 2 * H * K], axis=-1)
    return q_TE.reshape(-1, H, K), k_TE.reshape(-1, H, K), v_TE.reshape(-1, H, V)


def written_out(p, x_TD):
    """o of each token of one text."""
    u_TD = rms_norm(x_TD, p["norm"])
    heads = lambda x_XD, name: (x_XD @ p[f"kernel_{name}"]).reshape(len(x_XD), G, D // G)
    scaled = lambda x, name: rms_norm(x, {"scale": p[f"scale_{name}"]})
    asked_THK = unit(projected(p, u_TD)[0])
    W_HVK, S_HVK = p["memory_0"].copy(), np.zeros((H, V, K))
    o_TD, y_TD = np.zeros_like(x_TD), np.zeros((0, D))
    for t in range(len(x_TD)):
        if t % C == 0:
            before_HVK, context = W_HVK.copy(), [p["persistent"][n] for n in range(N)]
            places, own = list(range(N)), []
        read_HV = np.einsum("hvk,hk->hv", before_HVK, asked_THK[t])
        h_D = scaled(read_HV, "read").reshape(-1) @ p["kernel_read"]
        context, places = [*context, h_D], [*places, N + t % C]
        own = [*own, (u_TD[t], N + C + t % C)]
        seen_XD = np.stack(context + [u_D for u_D, _ in own])
        at = places + [place for _, place in own]
        k_XGR = np.stack([turned(k_GR, place) for k_GR, place in zip(heads(seen_XD, "k"), at, strict=True)])
        q_GR = turned(heads(u_TD[t : t + 1], "q")[0], N + C + t % C)
        e_XG = np.exp(np.einsum("gr,xgr->xg", q_GR, k_XGR) / np.sqrt(D / G))
        y_D = np.einsum("xg,xgr->gr", e_XG / e_XG.sum(0), heads(seen_XD, "v")).reshape(D) @ p["kernel_out"]
        y_D = scaled(y_D, "attended")
        y_TD = np.concatenate([y_TD, y_D[None]])
        q_HK, k_HK, v_HV = (x[-1] for x in projected(p, y_TD))
        q_HK, k_HK = unit(q_HK), unit(k_HK)
        theta_H, eta_H, alpha_H = np.split(sigmoid(y_D @ p["kernel_gates"] + p["bias_gates"]), 3)
        for h in range(H):
            error_V = W_HVK[h] @ k_HK[h] - v_HV[h]
            S_HVK[h] = eta_H[h] * S_HVK[h] - STEP * (1 - eta_H[h]) * theta_H[h] * np.outer(error_V, k_HK[h])
            W_HVK[h] = (1 - alpha_H[h]) * W_HVK[h] + S_HVK[h]
        m_D = scaled(np.einsum("hvk,hk->hv", W_HVK, q_HK), "read").reshape(-1) @ p["kernel_read"]
        o_TD[t] = y_D * sigmoid(scaled(m_D, "remembered"))
    return o_TD


def test_is_the_paper_token_by_token(run):
    params, tokens = drawn(MODEL), np.random.default_rng(0).integers(0, Z, (B, T))
    got, _ = run(params, tokens)
    p = jax.tree.map(np.float64, params["params"])
    for row in range(B):
        x_TD = p["embedding"][tokens[row]]
        x_TD = x_TD + written_out(p["block_0"]["layer"], x_TD)
        x_TD = x_TD + swiglu(rms_norm(x_TD, p["block_0"]["mlp_norm"]), p["block_0"]["mlp"])
        want = rms_norm(x_TD, p["norm"]) @ p["head"]
        np.testing.assert_allclose(got[row], want, atol=1e-4 * np.abs(want).max())


def test_segments_know_of_one_another_by_the_memory_alone(run):
    """If nothing is read of it, attention is local to its segment."""
    params, tokens = drawn(MODEL), np.random.default_rng(0).integers(0, Z, (B, T))
    other = np.where(np.arange(T) == 5, (tokens + 1) % Z, tokens)  # of the second segment
    mute = jax.tree_util.tree_map_with_path(lambda path, p: 0 * p if path[-1].key == "kernel_read" else p, params)
    for given, last in ((mute, 2 * C), (params, T)):
        changed_T = np.abs(run(given, other)[0] - run(given, tokens)[0]).max(axis=(0, 2)) > 1e-5
        np.testing.assert_array_equal(changed_T, (np.arange(T) >= 5) & (np.arange(T) < last))
