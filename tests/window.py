"""Attention over a window with a prefix in front, token by token in NumPy, what of a Transformer is around it, and
parameters drawn without compiling `init`.

Dims: T time, H heads, K key, V value, U tokens of the prefix.
"""

import jax
import numpy as np


def turned(x_HK, place, base=10_000.0):
    """Pairs of channels as complex numbers."""
    F = x_HK.shape[-1] // 2
    z_HF = (x_HK[:, ::2] + 1j * x_HK[:, 1::2]) * np.exp(1j * place * base ** (-np.arange(F) / F))
    return np.stack([z_HF.real, z_HF.imag], axis=-1).reshape(x_HK.shape)


def attended(q_THK, k_THK, v_THV, prefix_k_UHK, prefix_v_UHV, window):
    """[T, H, V]. The prefix has no place, tokens of the window have theirs in the text."""
    y_THV = np.zeros_like(v_THV)
    for t in range(len(q_THK)):
        near = range(max(0, t - window + 1), t + 1)
        q_HK = turned(q_THK[t], t)
        scores = [np.sum(q_THK[t] * k_HK, -1) for k_HK in prefix_k_UHK]
        scores += [np.sum(q_HK * turned(k_THK[j], j), -1) for j in near]
        scores_HX = np.stack(scores, axis=-1) / np.sqrt(q_THK.shape[-1])
        p_HX = np.exp(scores_HX - scores_HX.max(-1, keepdims=True))
        v_XHV = np.concatenate([prefix_v_UHV, v_THV[list(near)]])
        y_THV[t] = np.einsum("hx,xhv->hv", p_HX / p_HX.sum(-1, keepdims=True), v_XHV)
    return y_THV


def window_layer(p, x_TD, persistent_ND, window):
    """The same, from and to channels, with the parameters of memzoo.models.titans.WindowAttention."""
    project = lambda x_TD, name: np.einsum("td,dhk->thk", x_TD, p[name]["kernel"])
    prefix = project(persistent_ND, "k"), project(persistent_ND, "v")
    y_THV = attended(*(project(x_TD, name) for name in "qkv"), *prefix, window)
    return np.einsum("thk,hkd->td", y_THV, p["out"]["kernel"])


def rms_norm(x_TD, p):
    return x_TD / np.sqrt(np.mean(x_TD**2, -1, keepdims=True) + 1e-6) * p["scale"]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def swiglu(x_TD, p):
    gate_TF, up_TF = np.split(x_TD @ p["gate_up"]["kernel"], 2, axis=-1)
    return gate_TF * sigmoid(gate_TF) * up_TF @ p["out"]["kernel"]


def drawn(model, size=0.3):
    """Parameters of a language model, scales around 1, all else around 0."""
    rng = np.random.default_rng(0)

    def draw(path, p):
        return np.float32((path[-1].key == "scale") + size * rng.standard_normal(p.shape))

    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), np.int32))
    return jax.tree_util.tree_map_with_path(draw, shapes)
