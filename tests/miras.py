"""Miras' memory in NumPy: its network with the gradient by hand, and what stands around it, one token after the other.

Dims: T time, D width, H heads, K head, F hidden, V what the loss is told.
"""

import numpy as np

SLOPE = np.sqrt(2 / np.pi)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def gelu(x):
    return x / 2 * (1 + np.tanh(SLOPE * (x + 0.044715 * x**3)))


def gelu_slope(x):
    tanh = np.tanh(SLOPE * (x + 0.044715 * x**3))
    return (1 + tanh) / 2 + x / 2 * (1 - tanh**2) * SLOPE * (1 + 3 * 0.044715 * x**2)


def unit(x):
    return x / np.sqrt(np.sum(x**2, -1, keepdims=True) + 1e-6)


def read(W, norm, x_K):
    z_K = W["W1"] @ gelu(W["W2"] @ x_K)
    return x_K + (z_K - z_K.mean()) / np.sqrt(z_K.var() + 1e-6) * norm[0] + norm[1]


def gradient(W, norm, x_K, dy_K):
    """Of a loss whose slope in what is read is dy."""
    a_F = W["W2"] @ x_K
    z_K = W["W1"] @ gelu(a_F)
    deviation = np.sqrt(z_K.var() + 1e-6)
    s_K, ds_K = (z_K - z_K.mean()) / deviation, dy_K * norm[0]
    dz_K = (ds_K - ds_K.mean() - s_K * (ds_K * s_K).mean()) / deviation
    return {"W1": np.outer(dz_K, gelu(a_F)), "W2": np.outer(W["W1"].T @ dz_K * gelu_slope(a_F), x_K)}


def written_out(p, x_TD, chunk, step, slope, weights):
    """The mixer's outputs for one sequence. slope: (y_K - v_K, p, low_N, head) -> dl/dy without eta."""
    H, K = p["norm_scale"].shape
    T = len(x_TD)
    past_LE = np.concatenate([np.zeros((len(p["conv"]) - 1, 3 * H * K)), x_TD @ p["qkv"]["kernel"]])
    qkv_TE = sum(f_E * past_LE[w : w + T] for w, f_E in enumerate(p["conv"]))
    q_THK, k_THK, v_THK = np.split(silu(qkv_TE).reshape(T, H, 3 * K), 3, axis=-1)
    low_TN = x_TD @ p["gates_low"]["kernel"]
    gate = lambda name: (low_TN @ p[name]["kernel"] + p[name]["bias"]).reshape(T, H, -1)
    eta_THK, alpha_THR = step * sigmoid(gate("eta")), sigmoid(gate("alpha"))
    y_THK = np.zeros((T, H, K))
    for h in range(H):
        A, norm = {name: p[name][h] for name in ("W1", "W2")}, (p["norm_scale"][h], p["norm_bias"][h])
        for t in range(T):
            if t % chunk == 0:
                start = {name: weights(A[name]) for name in A}
            k_K = unit(k_THK[t, h])
            dy_K = eta_THK[t, h] * slope(read(start, norm, k_K) - v_THK[t, h], gate, t, h)
            g = gradient(start, norm, k_K, dy_K)
            forget = dict(zip(("W1", "W2"), np.split(alpha_THR[t, h], [K]), strict=True))
            A = {name: (1 - forget[name])[:, None] * A[name] - g[name] for name in A}
            y_THK[t, h] = read({name: weights(A[name]) for name in A}, norm, unit(q_THK[t, h]))
    y_THK = y_THK / np.sqrt(np.mean(y_THK**2, -1, keepdims=True) + 1e-6) * p["norm"]["scale"]
    y_THK = y_THK * silu(np.einsum("td,dhk->thk", x_TD, p["gate"]["kernel"]))
    return np.einsum("thk,hkd->td", y_THK, p["out"]["kernel"])
