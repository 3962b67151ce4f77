"""Facts of TransNormerLLM, arXiv:2307.14995 and arXiv:2405.17381."""

import jax
import numpy as np
import pytest

from memzoo.models.backbone import describe
from memzoo.models.transnormer import TransNormer

B, T, D, F, H, Z, L = 2, 9, 12, 7, 2, 11, 3
K = D // H
MODEL = TransNormer(Z, D, L, heads=H, hidden=F, impl="scan")


@pytest.fixture(scope="module")
def params():
    params = jax.jit(MODEL.init)(jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda p: np.float32(p + 0.1 * rng.standard_normal(p.shape)), params)


def silu(x):
    return x / (1 + np.exp(-x))


def srms_norm(x):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6)


def by_the_left_product(q, k, v, log_lambda, theta):
    """[(Q K') * M] V, with M and the rotation of eq. 9 as functions of t - s; all [T, H, .]."""
    apart = np.arange(T)[:, None] - np.arange(T)
    seen = np.where(apart >= 0, np.exp(log_lambda[:, None, None] * np.maximum(apart, 0)), 0)
    turned = np.cos(theta[:, None, None] * apart[..., None])  # [H, T, T, K]
    return np.einsum("hts,thk,shk,htsk,shv->thv", seen, q, k, turned, v)


def test_is_the_equation(params):
    tokens = np.random.default_rng(0).integers(0, Z, (B, T))
    got, _ = jax.jit(MODEL.apply)({"params": params}, tokens)
    p = jax.tree.map(np.float64, params)
    for row in range(B):
        x = p["embedding"][tokens[row]] * np.sqrt(D)
        for l in range(L):
            layer = p[f"layer_{l}"]
            w, n = layer["mixer"], srms_norm(x)
            q, k, v, u = (np.einsum("td,dhk->thk", n, w[name]["kernel"]) for name in ("q", "k", "v", "gate"))
            slopes = 2.0 ** (-8 * np.arange(1, H + 1) / H)  # ALiBi's
            log_lambda = -slopes * (1 - l / (L - 1) + 1e-5)
            theta = w["theta"] if l == 0 else np.zeros((H, K))
            o = by_the_left_product(silu(q), silu(k), v, log_lambda, theta)
            o = srms_norm(o.reshape(T, D)) * u.reshape(T, D)
            x = x + o @ w["out"]["kernel"].reshape(D, D)
            n, w = srms_norm(x), layer["sglu"]
            x = x + (n @ w["v"]["kernel"] * (n @ w["u"]["kernel"])) @ w["out"]["kernel"]
        want = srms_norm(x) @ p["embedding"].T
        np.testing.assert_allclose(got[row], want, atol=1e-4 * np.abs(want).max())


def test_layers_forget_the_less_the_higher_they_are():
    depths = [MODEL.make_mixer(layer).depth for layer in range(L)]
    assert depths == [0, 0.5, 1]
    assert TransNormer(Z, D, 1, heads=H).make_mixer(0).depth == 0


def test_the_first_layer_alone_has_rotations_and_norms_have_no_parameters(params):
    assert [("theta" in params[f"layer_{l}"]["mixer"]) for l in range(L)] == [True, False, False]
    assert set(params) == {"embedding", "layer_0", "layer_1", "layer_2"}
    assert set(params["layer_1"]) == {"mixer", "sglu"}
    assert [state.S_BHKV.dtype for state in MODEL.initial_state(1)] == [np.complex64, np.float32, np.float32]


def test_counts_its_parameters():
    """q, k, v, u and out are D^2 each, the SGLU 3 D F: 385M at the released 24 layers of 1,024 with 2,816."""
    assert describe(MODEL).parameters == Z * D + L * (5 * D**2 + 3 * D * F) + D
    assert (
        describe(TransNormer(Z, D, L, heads=H, hidden=F, tied=False)).parameters == describe(MODEL).parameters + Z * D
    )
    released = describe(TransNormer(64_000, 1024, 24, hidden=2816)).parameters
    assert abs(released / 385e6 - 1) < 0.05


@pytest.mark.long
def test_the_first_loss_is_near_that_of_a_uniform_guess():
    model = TransNormer(65, 64, 2)
    tokens = np.random.default_rng(1).integers(0, 65, (4, 33))
    (logits, _), _ = jax.jit(model.init_with_output)(jax.random.key(0), tokens[:, :-1])
    nats = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), tokens[:, 1:, None], -1).mean()
    assert abs(nats - np.log(65)) < 0.6


@pytest.mark.long
def test_remat_changes_nothing(params):
    tokens = np.random.default_rng(0).integers(0, Z, (B, T))

    def gradient(model):
        return jax.jit(jax.grad(lambda p: np.sin(1) * (model.apply({"params": p}, tokens)[0] ** 2).sum()))(params)

    again = TransNormer(Z, D, L, heads=H, hidden=F, impl="scan", remat=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradient(again), gradient(MODEL))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": 0}, "layers: expected an integer >= 1, got 0"),
        ({"hidden": 0}, "hidden: expected an integer >= 1, got 0"),
        ({"heads": 5}, "width: expected a positive multiple of heads = 5, got 12"),
        ({"slopes": "papers"}, "slopes: unknown slopes 'papers'; did you mean paper"),
        ({"impl": "chunks"}, "impl: expected one of auto, scan, associative, chunk; got 'chunks', did you mean chunk"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        TransNormer(**{"vocab": Z, "width": D, "layers": L, "heads": H, **fields})
