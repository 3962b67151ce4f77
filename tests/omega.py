"""The Omega rule in NumPy: a network of one or two matrices with the gradient by hand, and what stands around it.

Dims: T time, D width, H heads, K key, V value, N features of a key.
"""

import itertools
import math

import numpy as np

from tests.miras import sigmoid, silu, unit


def phi(x_K, s):
    """Every monomial up to the degree, in NumPy's own way."""
    K, found = len(x_K), []
    for degree in range(len(s)):
        for b in itertools.combinations_with_replacement(range(K), degree):
            count = math.factorial(degree) / math.prod(math.factorial(b.count(i)) for i in set(b))
            found.append(s[degree] * math.sqrt(count) * math.prod(x_K[i] for i in b))
    return np.array(found)


def read(W, x_N):
    return W["1"] @ silu(W["0"] @ x_N) if "1" in W else W["0"] @ x_N


def gradient(W, x_N, v_V):
    """Of half the square of the error."""
    if "1" not in W:
        return {"0": np.outer(W["0"] @ x_N - v_V, x_N)}
    a_F = W["0"] @ x_N
    error_V = W["1"] @ silu(a_F) - v_V
    slope_F = sigmoid(a_F) * (1 + a_F * (1 - sigmoid(a_F)))
    return {"0": np.outer(W["1"].T @ error_V * slope_F, x_N), "1": np.outer(error_V, silu(a_F))}


def written_out(p, x_TD, shapes, features, window, chunk, gates, direction=lambda S: S):
    """The mixer's outputs for one sequence. gates: x_D @ kernel + bias -> theta, eta, alpha, rate, gamma, each [H]."""
    (H, K, V), T = shapes, len(x_TD)
    past_LE = np.concatenate([np.zeros((len(p["conv"]) - 1, H * (2 * K + V))), x_TD @ p["qkv"]["kernel"]])
    qkv_TE = sum(f_E * past_LE[w : w + T] for w, f_E in enumerate(p["conv"]))
    q_THK, k_THK, v_THV = np.split(silu(qkv_TE).reshape(T, H, 2 * K + V), [K, 2 * K], axis=-1)
    given = [gates(x_D @ p["gates"]["kernel"] + p["gates"]["bias"]) for x_D in x_TD]
    y_THV = np.zeros((T, H, V))
    for h in range(H):
        W = {name.removeprefix("memory_"): p[name][h] for name in p if name.startswith("memory_")}
        S = {name: 0 for name in W}
        for t in range(T):
            if t % chunk == 0:
                start = dict(W)
            theta, eta, alpha, rate, _ = (gate[h] for gate in given[t])
            for name in W:
                last = range(max(0, t - window + 1), t + 1)
                g = [
                    given[i][4][h] * gradient(start, phi(unit(k_THK[i, h]), features), v_THV[i, h])[name] for i in last
                ]
                S[name] = eta * S[name] + theta * sum(g)
                W = W | {name: (1 - alpha) * W[name] - rate * direction(S[name])}
            y_THV[t, h] = read(W, phi(unit(q_THK[t, h]), features))
    y_THV = y_THV / np.sqrt(np.mean(y_THV**2, -1, keepdims=True) + 1e-6) * p["norm"]["scale"]
    y_THV = y_THV * silu(np.einsum("td,dhv->thv", x_TD, p["gate"]["kernel"]))
    return np.einsum("thv,hvd->td", y_THV, p["out"]["kernel"])
