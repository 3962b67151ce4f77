"""Where full attention lies in a stack, at the ratios of arXiv:2507.06457 and at others, and what that costs."""

import jax
import numpy as np
import pytest

import memzoo
from memzoo.mixers import attention, gated_deltanet
from memzoo.models.backbone import LanguageModel, describe
from memzoo.models.hybrid import BY_HEIGHT, full_layers, hybrid

Z, D = 11, 16
FIELDS = {"gated_deltanet": {"heads": 2}, "attention": {"heads": 2, "window": 5}}


def layout(ratio, layers):
    return "".join("F" if full else "l" for full in full_layers(ratio, layers))


def test_layouts_of_the_paper():
    """Linear layers, then a full one: of 25, 13, 7 and 4 layers one, the last."""
    for n in (24, 12, 6, 3):
        assert layout(f"{n}:1", 3 * (n + 1)) == 3 * (n * "l" + "F")
    assert layout("3:1", 24) == 6 * "lllF"


def test_layouts_at_the_ends():
    assert layout("0:1", 3) == "FFF" and layout("1:0", 3) == "lll"
    assert layout("1:1", 4) == "lFlF" and layout("1:3", 8) == 2 * "lFFF" and layout("2:2", 4) == "lFlF"
    assert layout("5:2", 14) == 2 * "lllFllF", "the two of seven are spread"


@pytest.mark.parametrize("layers", [2, 5, 24, 32])
@pytest.mark.parametrize("ratio", ["24:1", "12:1", "6:1", "3:1", "1:1", "1:6", "5:2"])
def test_other_depths_get_the_nearest_number_evenly_spread(ratio, layers):
    """The paper's 24 layers at 24:1 have one full layer, not none."""
    full = np.array(full_layers(ratio, layers))
    part = int(ratio.split(":")[1]) / sum(map(int, ratio.split(":")))
    assert abs(full.sum() - part * layers) <= 0.5 or full.sum() in (1, layers - 1)
    assert 1 <= full.sum() <= layers - 1 and full[-1]
    stretches = np.diff(np.flatnonzero(full), prepend=-1)
    assert stretches.max() - stretches.min() <= 1


def test_the_default_is_what_the_paper_recommends():
    model = hybrid(Z, D, 8)
    assert model.mixers == ("gated_deltanet",) * 3 + ("attention",)
    kinds = [type(state) for state in model.initial_state(1)]
    assert kinds == 2 * ([gated_deltanet.State] * 3 + [attention.State])


def test_0_to_1_is_a_transformer_and_1_to_0_has_no_attention():
    assert hybrid(Z, D, 3, "0:1", fields=FIELDS) == LanguageModel(
        Z, D, 3, ("attention",), {"attention": FIELDS["attention"]}
    )
    assert hybrid(Z, D, 3, "1:0", fields=FIELDS) == LanguageModel(
        Z, D, 3, ("gated_deltanet",), {"gated_deltanet": FIELDS["gated_deltanet"]}
    )


@pytest.mark.long
def test_0_to_1_has_a_transformers_parameters_and_logits():
    """In NumPy: RMSNorm, causal softmax over queries and keys turned by their places, RMSNorm, SwiGLU; twice."""
    tokens_BT = np.random.default_rng(0).integers(0, Z, (2, 9))
    model, K = hybrid(Z, D, 2, "0:1", hidden=10, fields={"attention": {"heads": 2}}), D // 2
    params = jax.jit(model.init)(jax.random.key(0), tokens_BT)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda p: np.float32(p + 0.2 * rng.standard_normal(p.shape)), params)
    got, _ = jax.jit(model.apply)(params, tokens_BT)

    p = jax.tree.map(np.float64, params["params"])
    assert sum(leaf.size for leaf in jax.tree.leaves(p)) == 2 * Z * D + D + 2 * (2 * D + 4 * D * D + 3 * D * 10)
    norm = lambda x, q: x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * q["scale"]
    turns = np.exp(1j * np.arange(9)[:, None] * 10_000.0 ** (-np.arange(K // 2) / (K // 2)))

    def turned(x_BTHK):
        pairs = (x_BTHK[..., 0::2] + 1j * x_BTHK[..., 1::2]) * turns[:, None]
        return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x_BTHK.shape)

    x = p["embedding"][tokens_BT]
    for layer in (p["stack"]["layer_0"], p["stack"]["layer_1"]):
        u = norm(x, layer["mixer_norm"])
        q, k, v = (np.einsum("btd,dhk->bthk", u, layer["mixer"][name]["kernel"]) for name in "qkv")
        scores = np.einsum("bthk,bshk->bhts", turned(q), turned(k)) / np.sqrt(K)
        weights = np.exp(scores) * np.tri(9)
        y = np.einsum("bhts,bshk->bthk", weights / weights.sum(-1, keepdims=True), v)
        x = x + np.einsum("bthk,hkd->btd", y, layer["mixer"]["out"]["kernel"])
        gate, up = np.split(norm(x, layer["mlp_norm"]) @ layer["mlp"]["gate_up"]["kernel"], 2, axis=-1)
        x = x + gate / (1 + np.exp(-gate)) * up @ layer["mlp"]["out"]["kernel"]
    want = norm(x, p["norm"]) @ p["head"]
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_only_full_layers_keep_tokens():
    """The state of r linear layers and one full one is r times a linear state and one cache."""
    linear, full = (describe(hybrid(Z, D, 1, ratio, fields=FIELDS)).state_bytes for ratio in ("1:0", "0:1"))
    assert describe(hybrid(Z, D, 7, "6:1", fields=FIELDS)).state_bytes == 6 * linear + full
    longer = {**FIELDS, "attention": {"heads": 2, "window": 50}}
    grown = describe(hybrid(Z, D, 7, "6:1", fields=longer)).state_bytes
    assert grown - describe(hybrid(Z, D, 7, "6:1", fields=FIELDS)).state_bytes == 45 * 2 * D * 4


def test_layers_can_be_scanned():
    """A pattern is as short as it can be."""
    assert hybrid(Z, D, 8, "3:1", scan_layers=True).mixers == ("gated_deltanet",) * 3 + ("attention",)
    assert len(hybrid(Z, D, 5, "3:1", scan_layers=True).mixers) == 5


def test_bounds_and_decays_rise_with_height():
    """HGRN2's lower bound is l / L at the start; Lightning's decay knows l / (L - 1); full layers count among L."""
    model = hybrid(Z, D, 4, linear="hgrn2")
    assert [model.make_mixer(place).lower_bound for place in model.places()[:3]] == [0, 0.25, 0.5]
    model = hybrid(Z, D, 5, "1:0", linear="lightning", fields={"lightning": {"heads": 2}})
    assert [model.make_mixer(place).depth for place in model.places()] == [0, 0.25, 0.5, 0.75, 1]
    model = hybrid(Z, D, 4, linear="rwkv7")
    places = [model.make_mixer(place) for place in model.places()[:3]]
    assert [(mixer.layer, mixer.layers) for mixer in places] == [(0, 4), (1, 4), (2, 4)]
    given = hybrid(Z, D, 4, linear="hgrn2", fields={"hgrn2": {"lower_bound": 0.1}})
    assert [given.make_mixer(place).lower_bound for place in given.places()[:3]] == [0.1] * 3


def test_no_mixer_that_asks_for_its_height_is_forgotten():
    """By the names of fields; the depth of Titans' memory is another thing."""
    asks = {
        name
        for name in memzoo.names()
        if {"layer", "layers", "depth", "lower_bound"} & set(type(memzoo.make(name, width=8)).__dataclass_fields__)
    }
    assert asks - {"titans"} == set(BY_HEIGHT)


@pytest.mark.parametrize("ratio", ["0:0", "3", "3:1:1", "-3:1", "1.5:1", "", 3, (3, 1)])
def test_bad_ratios_are_named(ratio):
    with pytest.raises(ValueError, match="ratio: expected linear:full, two whole numbers and not both 0, got "):
        hybrid(Z, D, 4, ratio)


def test_bad_fields_are_named():
    with pytest.raises(ValueError, match="layers: expected at least 2 for a ratio of 3:1, got 1"):
        hybrid(Z, D, 1)
    with pytest.raises(ValueError, match="layers: expected an integer >= 1, got 0"):
        hybrid(Z, D, 0)
    with pytest.raises(ValueError, match="unknown architecture 'gated_deltanett'; did you mean gated_deltanet"):
        hybrid(Z, D, 4, linear="gated_deltanett")
    with pytest.raises(
        ValueError, match="fields: 'atention' is neither the linear nor the full mixer; did you mean at"
    ):
        hybrid(Z, D, 4, fields={"atention": {}})
    with pytest.raises(ValueError, match="window: expected an integer >= 1, got 0"):
        hybrid(Z, D, 4, fields={"attention": {"window": 0}})
