"""Facts of the xLSTM models, arXiv:2405.04517 and arXiv:2503.13427.

Dims: B batch, T time, D width, F and G hidden, H heads, K key and value, J channels of a block of q, k or v.
"""

import math

import jax
import numpy as np
import pytest

from memzoo.models.backbone import describe
from memzoo.models.xlstm import XLSTM, XLSTM7B

B, T, D, F, G, H, J, Z = 2, 9, 6, 12, 7, 2, 3, 11
K = F // H
MODEL = XLSTM(Z, D, 2, "1:1", heads=H, inner=F, hidden=G, qkv_block=J, impl="scan")


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda p: (0.5 * rng.standard_normal(p.shape)).astype(p.dtype), shapes)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2


def layer_norm(x, scale):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale["scale"]


def conv(x, p):
    return silu(p["conv_bias"] + sum(p["conv"][3 - s] * np.pad(x, ((s, 0), (0, 0)))[: len(x)] for s in range(4)))


def block_diagonal(blocks):
    M, J, _ = blocks.shape
    return np.block([[blocks[m] if m == n else np.zeros((J, J)) for n in range(M)] for m in range(M)])


def matrix_block(x, p):
    """With the quadratic form: y_t = sum_s D_ts (q_t k_s) v_s / max(|sum_s D_ts q_t k_s|, 1), no stabiliser."""
    u, z = np.split(layer_norm(x, p["norm"]) @ p["up"]["kernel"], 2, axis=-1)
    c = conv(u, p)
    q, k, v = (of @ block_diagonal(W) for of, W in zip((c, c, u), p["qkv"], strict=True))
    i, f = (np.concatenate([q, k, v], -1) @ p[g]["kernel"] + p[g]["bias"] for g in ("input", "forget"))
    heads = []
    for h in range(H):
        of = slice(h * K, (h + 1) * K)
        since = np.cumsum(np.log(sigmoid(f[:, h])))
        D_TT = np.tril(np.exp(since[:, None] - since + i[:, h]))
        C_TT = D_TT * (q[:, of] @ k[:, of].T) / np.sqrt(K)
        y = C_TT @ v[:, of] / np.maximum(np.abs(C_TT.sum(1, keepdims=True)), 1)
        heads.append(layer_norm(y, {"scale": p["head_norm"]["scale"][h]}))
    return x + ((np.concatenate(heads, -1) + p["skip"] * c) * silu(z)) @ p["out"]["kernel"]


def scalar_block(x, p):
    """Token by token, without the stabiliser."""
    w, n = p["mixer"], layer_norm(x, p["mixer_norm"])
    c = conv(n, w)
    a = [of @ block_diagonal(W) + b.ravel() for of, W, b in zip((c, c, n, n), w["in"], w["bias"], strict=True)]
    cell = total = h = np.zeros(D)
    hs = []
    for t in range(len(x)):
        R = np.stack([h.reshape(H, -1)[j] @ w["recurrent"][j] for j in range(H)]).reshape(H, 4, -1)
        i, f, z, o = (a[g][t] + R[:, g].ravel() for g in range(4))
        cell, total = sigmoid(f) * cell + np.exp(i) * np.tanh(z), sigmoid(f) * total + np.exp(i)
        h = sigmoid(o) * cell / total
        hs.append(layer_norm(h.reshape(H, -1), w["norm"]).ravel())
    x = x + np.stack(hs)
    gate, up = np.split(layer_norm(x, p["mlp_norm"]) @ p["gate_up"]["kernel"], 2, axis=-1)
    return x + (gelu(gate) * up) @ p["out"]["kernel"]


def test_1_to_1_is_one_block_of_each(params):
    tokens = np.random.default_rng(0).integers(0, Z, (B, T))
    got, _ = jax.jit(MODEL.apply)({"params": params}, tokens)
    p = jax.tree.map(np.float64, params)
    for row in range(B):
        x = scalar_block(matrix_block(p["embedding"][tokens[row]], p["layer_0"]), p["layer_1"])
        want = layer_norm(x, p["norm"]) @ p["head"]
        np.testing.assert_allclose(got[row], want, atol=1e-3 * np.abs(want).max())


def layout(*arguments, **fields):
    return "".join("m" if "inner" in block else "s" for _, block in XLSTM(Z, 8, *arguments, **fields).blocks())


def test_layouts():
    assert layout(4, "1:0") == "mmmm" and layout(4, "0:1") == "ssss" and layout(4, "1:1") == "msms"
    assert layout(16) == 2 * "mmmmmmms"
    assert layout(6, slstm_at=(1, 2)) == "mssmmm"
    depths = [block["mixer_fields"]["depth"] for _, block in XLSTM(Z, 8, 5, "0:1").blocks()]
    assert depths == [0, 0.25, 0.5, 0.75, 1], "later layers begin with more units that remember"


@pytest.mark.parametrize(("width", "layers", "scalars", "millions"), [(768, 24, 2, 163.7), (2048, 48, 6, 1420.1)])
def test_counts_the_papers_parameters(width, layers, scalars, millions):
    """xLSTM[7:1] "125M" and "1.3B", with GPT-2's vocabulary in multiples of 64."""
    blocks = {r: describe(XLSTM(50_304, width, 1, r)).parameters for r in ("1:0", "0:1")}
    ends = 2 * 50_304 * width + width
    total = ends + (layers - scalars) * (blocks["1:0"] - ends) + scalars * (blocks["0:1"] - ends)
    assert round(total / 1e6, 1) == millions


def test_counts_the_parameters_of_7b():
    ends = 2 * 50_304 * 4096 + 4096
    assert ends + 32 * (describe(XLSTM7B(50_304, 4096, 1)).parameters - ends) == 6_865_424_896


@pytest.mark.long
def test_7b_caps_what_a_language_model_says():
    model = XLSTM7B(Z, 16, 1, fields={"mlstm": {"heads": 2}}, logit_cap=2.0)
    assert model.hidden == 64 and model.mixers == ("mlstm",)
    tokens = np.random.default_rng(0).integers(0, Z, (B, T))
    rng, shapes = np.random.default_rng(1), jax.eval_shape(model.init, jax.random.key(0), tokens)
    params = jax.tree.map(lambda p: rng.standard_normal(p.shape).astype(p.dtype), shapes)
    got, _ = jax.jit(model.apply)(params, tokens)
    free, _ = jax.jit(model.clone(logit_cap=1e6).apply)(params, tokens)
    np.testing.assert_allclose(got, 2 * np.tanh(np.asarray(free) / 2), atol=1e-4)
    assert np.abs(got).max() < 2


@pytest.mark.long
def test_initial_parameters():
    """Deviations sqrt(2 / (5 D)), and 2 / (L sqrt(D)) of what goes back to the residual, L layers; forget biases 3 to
    6, input biases of deviation 0.1; skips and norms 1."""
    width, layers = 128, 2
    model = XLSTM(300, width, layers, "1:1")
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    m, s = params["layer_0"], params["layer_1"]
    assert m["up"]["kernel"].shape == (128, 512) and s["gate_up"]["kernel"].shape == (128, 2 * 192)
    for weight in (params["embedding"], params["head"], m["up"]["kernel"], m["qkv"], s["gate_up"]["kernel"]):
        assert abs(np.std(weight) / np.sqrt(2 / 5 / width) - 1) < 0.05
    for weight in (m["out"]["kernel"], s["out"]["kernel"]):
        assert abs(np.std(weight) / (2 / layers / width**0.5) - 1) < 0.05
    np.testing.assert_allclose(m["forget"]["bias"], [3, 4, 5, 6])
    assert 0 < np.abs(m["input"]["bias"]).max() < 0.4
    assert not np.any(m["forget"]["kernel"]) and not np.any(m["input"]["kernel"])
    assert np.all(np.asarray(m["skip"]) == 1) and np.all(np.asarray(s["mlp_norm"]["scale"]) == 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": 0}, "layers: expected an integer >= 1, got 0"),
        ({"heads": 5}, "inner: expected a positive multiple of heads = 5, got 12"),
        ({"qkv_block": 5}, "inner: expected a positive multiple of qkv_block = 5, got 12"),
        ({"hidden": 0}, "hidden: expected an integer >= 1, got 0"),
        ({"heads": 4}, "width: expected a positive multiple of heads = 4, got 6"),
        ({"ratio": "7-1"}, "ratio: "),
        ({"slstm_at": (2,)}, r"slstm_at: expected layers in 0 ... 1, got \(2,\)"),
        ({"impl": "chunks"}, "impl: expected one of auto, scan, associative, chunk; got 'chunks', did you mean chunk"),
        ({"slstm_impl": "newtons"}, "impl: .*did you mean newton"),
    ],
)
def test_bad_fields_are_named(fields, message):
    own = {"vocab": Z, "width": D, "layers": 2, "ratio": "1:1", "heads": H, "inner": F, "qkv_block": J}
    with pytest.raises(ValueError, match=message):
        XLSTM(**{**own, **fields})


def test_a_cap_that_is_none_is_refused():
    with pytest.raises(ValueError, match="logit_cap: expected a number > 0, got -1"):
        XLSTM7B(Z, 16, 1, logit_cap=-1)
