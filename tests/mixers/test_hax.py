"""Facts of the HAX paper, arXiv:2507.00449.

Dims: as in memzoo/mixers/hax.py.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers import hax

B, T, D, N, P, R, M, BITS = 2, 30, 6, 4, 3, 3, 4, 2
V, S = 2 * D, 2**BITS
FIELDS = {"head_dim": P, "state_size": N, "bucket_keys": R, "selected_keys": M, "bits": BITS}


def setup(**fields):
    """A mixer, parameters away from their zeros and ones, and an input."""
    mixer = memzoo.make("hax", width=D, **{**FIELDS, **fields})
    rng = np.random.default_rng(0)
    params = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, D)))
    params = jax.tree.map(lambda w: np.asarray(w + 0.3 * rng.normal(size=w.shape), np.float32), params)
    return mixer, params, rng.normal(size=(B, T, D)).astype(np.float32)


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(x):
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def sees(asks, joins, score, t):
    """The last R keys of the query's bucket, and the M best, of tokens 0 ... t."""
    bucket = [s for s in range(t + 1) if joins[s] == asks[t]][-R:]
    return sorted({*bucket, *sorted(range(t + 1), key=lambda s: (score[s], s))[-M:]})


def reference(params, x_TD):
    """One sequence, token by token, from all that was before."""
    p = jax.tree.map(np.float64, params["params"])
    W = len(p["conv"])
    padded = np.concatenate([np.zeros((W - 1, V + 2 * N)), x_TD @ p["xBC"]["kernel"]])
    xBC = silu(p["conv_bias"] + sum(p["conv"][w] * padded[w : w + len(x_TD)] for w in range(W)))
    v, B_TN, C_TN = np.split(xBC, [V, V + N], axis=1)
    k, q = np.split(v @ p["kq"]["kernel"], 2, axis=1)
    A = -np.exp(p["A_log"])
    dt = np.log1p(np.exp(x_TD @ p["dt"]["kernel"] + p["dt"]["bias"]))
    planes = np.random.default_rng(0).normal(size=(N, BITS))
    bucket = lambda z, t: tuple((z[t] - z[: t + 1].mean(0)) @ planes > 0)
    asks, joins, score, h, y = [], [], [], np.zeros((V // P, N, P)), []
    for t, x_D in enumerate(x_TD):
        asks.append(bucket(q, t))
        joins.append(bucket(k, t))
        past = q[: t + 1].sum(0)
        z = np.concatenate([k[t] / N**0.5, past / np.linalg.norm(past)])
        for i in range(3):
            z = np.maximum(z, 0) if i else z
            z = z @ p[f"score_{i}"]["kernel"] + p[f"score_{i}"]["bias"]
        score.append(z[0])
        seen = sees(asks, joins, score, t)
        found = softmax(k[seen] @ q[t] / N**0.5) @ v[seen]
        x_HP = v[t].reshape(-1, P)
        h = np.exp(dt[t] * A)[:, None, None] * h + np.einsum("h,n,hp->hnp", dt[t], B_TN[t], x_HP)
        out = np.einsum("n,hnp->hp", C_TN[t], h) + p["D"][:, None] * x_HP
        out = (out + (p["scale"] * found).reshape(-1, P)) * silu(np.einsum("d,dhp->hp", x_D, p["gate"]["kernel"]))
        out = out.ravel() / np.sqrt(np.mean(out**2) + 1e-5) * p["norm"]["scale"][0]
        y.append(out @ p["out"]["kernel"][0])
    return np.array(y)


@pytest.mark.parametrize("impl", ["scan", "chunk"])
@pytest.mark.cases(1)
def test_is_the_equation_of_the_paper(monkeypatch, impl):
    monkeypatch.setattr(hax, "BLOCK", 8)
    mixer, params, x = setup(impl=impl)
    reset = np.zeros((B, T), bool)
    reset[1, [5, 6, 21]] = True
    y, _ = jax.jit(lambda *arguments: mixer.apply(*arguments))(params, x, None, reset)
    np.testing.assert_allclose(y[0], reference(params, x[0]), atol=2e-5)
    for start, end in itertools.pairwise((0, 5, 6, 21, T)):
        np.testing.assert_allclose(y[1, start:end], reference(params, x[1, start:end]), atol=2e-5)


@pytest.mark.parametrize("impl, cuts, floats", [("scan", (), 1), ("chunk", (10, 20), 2**25), ("chunk", (), 1)])
@pytest.mark.cases(1)
def test_a_query_sees_its_bucket_and_the_best_and_no_more(monkeypatch, impl, cuts, floats):
    """With queries of 0 all weights are equal, and value s is the s-th unit vector: outputs show what is seen.

    Each key once, and at most R + M of them, whatever is cut where: the keys of one call are the next one's.
    """
    monkeypatch.setattr(hax, "BLOCK", 8)
    monkeypatch.setattr(hax, "FLOATS", floats)
    rng = np.random.default_rng(1)
    asks, joins = rng.integers(S, size=(2, B, T)).astype(np.int32)
    score = rng.integers(9, size=(B, T)).astype(np.float32)  # with equal ones
    kv = np.concatenate([rng.normal(size=(B, T, N)), np.tile(np.eye(T), (B, 1, 1))], axis=-1).astype(np.float32)
    xs, keys, parts = (np.zeros((B, T, N), np.float32), kv, score, asks, joins), none(N + T), []
    attend = jax.jit(lambda xs, keys, fresh: hax.attend(*xs, keys, None, jnp.float32, impl, fresh), static_argnums=2)
    for start, end in itertools.pairwise((0, *cuts, T)):
        y, keys = attend([x[:, start:end] for x in xs], keys, start == 0)
        parts.append(np.asarray(y))
    for b, t in np.ndindex(B, T):
        seen = sees(asks[b], joins[b], score[b], t)
        expected = np.zeros(T)
        expected[seen] = 1 / len(seen)
        np.testing.assert_allclose(np.concatenate(parts, axis=1)[b, t], expected, atol=1e-6)
        assert len(seen) <= R + M


def none(Z, R=R):
    """No keys, for rows of Z numbers."""
    zeros, count = lambda *shape: np.zeros((B, *shape), np.float32), lambda *shape: np.zeros((B, *shape), np.int32)
    return hax.Keys(zeros(S, R, Z), count(S), zeros(M, Z), zeros(M), count(M), count())


def test_one_bucket_that_holds_all_is_softmax_attention():
    rng = np.random.default_rng(2)
    q, kv = (rng.normal(size=(B, T, n)).astype(np.float32) for n in (N, N + V))
    one = np.zeros((B, T), np.int32)
    y, _ = jax.jit(lambda q, kv, keys: hax.attend(q, kv, q[..., 0], one, one, keys, None, jnp.float32))(
        q, kv, none(N + V, R=T)
    )
    expected = [softmax(kv[0, : t + 1, :N] @ q[0, t]) @ kv[0, : t + 1, N:] for t in range(T)]
    np.testing.assert_allclose(y[0], expected, atol=1e-5)


@pytest.mark.long
def test_without_what_it_finds_it_is_mamba2():
    mixer, params, x = setup(impl="scan")
    p = params["params"]
    base = memzoo.make("mamba2", width=D, head_dim=P, state_size=N, impl="scan")
    alone = {name: w for name, w in p.items() if name not in ("kq", "scale") and not name.startswith("score")}
    y, state = jax.jit(mixer.apply)({"params": {**p, "scale": 0 * p["scale"]}}, x)
    want, last = jax.jit(base.apply)({"params": alone}, x)
    np.testing.assert_allclose(y, want, atol=1e-5)
    np.testing.assert_allclose(state.h_BHNP, last.h_BHNP, atol=1e-5)


def test_signs_agree_as_angles_do():
    """Two vectors at an angle a are on the same side of a random plane with probability 1 - a / pi."""
    mixer = memzoo.make("hax", width=2, state_size=200, bits=16)
    rng = np.random.default_rng(3)
    one, other = rng.normal(size=(2, 300, 200))
    for angle in (0.3, 1.0, np.pi / 2):
        turned = np.cos(angle) * one / np.linalg.norm(one, axis=1)[:, None]
        across = other - np.sum(other * one, 1)[:, None] * one / np.sum(one * one, 1)[:, None]
        turned += np.sin(angle) * across / np.linalg.norm(across, axis=1)[:, None]
        codes = [np.asarray(mixer.bucket(jnp.asarray(z[None], jnp.float32)))[0] for z in (one, turned)]
        differ = np.unpackbits((codes[0] ^ codes[1]).astype(np.uint16).view(np.uint8)).mean()
        np.testing.assert_allclose(differ, angle / np.pi, atol=0.03)


def products(jaxpr):
    """All of a program's, those in its loops too: (where, precision)."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield str(eqn.source_info.name_stack).split("/")[-1], eqn.params["precision"]
        inner = itertools.chain(*(value if isinstance(value, tuple) else [value] for value in eqn.params.values()))
        yield from itertools.chain(*(products(value) for value in inner if hasattr(value, "eqns")))


def test_no_product_that_decides_on_keys_may_be_rounded():
    """An accelerator rounds the operands of a product unless it is told not to: forms would be in other buckets."""
    mixer, params, x = setup(impl="scan")
    found = list(products(jax.make_jaxpr(mixer.apply)(params, x).jaxpr))
    exact = {where for where, precision in found if precision == (jax.lax.Precision.HIGHEST,) * 2}
    assert exact >= {"xBC", "kq", "score_0", "score_1", "score_2"}
    assert {where for where, precision in found if precision != (jax.lax.Precision.HIGHEST,) * 2} == {"gate", "out"}


@pytest.mark.parametrize("impl", ["scan", "chunk"])
def test_a_mean_of_very_many_tokens_still_forgets_and_does_not_grow(impl):
    x = np.stack([np.zeros((1, 5)), np.ones((1, 5))], axis=-1).astype(np.float32)
    seen = hax.counts(np.full(1, hax.MOST, np.int32), None, 5)
    mean, last = hax.means(x, seen, np.ones((1, 2), np.float32), None, impl)
    assert (np.diff(mean[0, :, 0]) < 0).all() and mean[0, 0, 0] < 1
    np.testing.assert_array_equal(mean[0, :, 1], 1)
    assert (np.asarray(seen) == hax.MOST).all() and (last == mean[:, -1]).all()


def test_the_hash_is_fixed_by_the_seed():
    z = np.random.default_rng(4).normal(size=(1, 50, N)).astype(np.float32)
    same, again, other = (np.asarray(memzoo.make("hax", width=D, seed=i, **FIELDS).bucket(z)) for i in (0, 0, 1))
    assert (same == again).all() and (same != other).any() and set(same.ravel()) <= set(range(S))


def ranking(params, x, mixer, **kinds):
    _, sown = mixer.apply(params, x, mutable=["losses"], **kinds)
    return sown["losses"]["ranking"][0]


def test_the_ranking_loss_orders_tokens_by_the_attention_they_get():
    """Pair by pair; tokens of different sequences are not compared."""
    rng = np.random.default_rng(5)
    score, q, k = rng.normal(size=(1, 4)), rng.normal(size=(1, T, N)), rng.normal(size=(1, T, N))
    chosen, starts = np.array([2, 25, 7, 13]), [0, 10]
    text = lambda t: max(start for start in starts if start <= t)
    mass = []
    for s in chosen:
        later = [t for t in range(s, T) if text(t) == text(s)]
        mass.append(sum(1 / (1 + np.exp(-q[0, t] @ k[0, s])) for t in later))
    losses = []
    for i, j in itertools.product(range(4), repeat=2):
        if text(chosen[i]) == text(chosen[j]):
            better = 0.5 if i == j else float(mass[i] > mass[j])
            p = 1 / (1 + np.exp(score[0, j] - score[0, i]))
            losses.append(-better * np.log(p) - (1 - better) * np.log(1 - p))
    reset = np.arange(T)[None] == 10
    got = hax.ranking(*(np.float32(z) for z in (score, q, k)), chosen, reset)
    np.testing.assert_allclose(got, np.mean(losses), rtol=1e-5)


@pytest.mark.long
def test_only_the_ranking_loss_trains_the_scores_and_it_trains_nothing_else():
    mixer, params, x = setup(impl="scan")
    outputs = lambda p: jnp.sum(mixer.apply(p, x)[0] ** 2)
    both = jax.jit(lambda p: (jax.grad(outputs)(p), jax.grad(lambda p: ranking(p, x, mixer))(p)))
    of_outputs, of_ranking = both(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(of_outputs):
        assert np.any(leaf != 0) != ("score" in jax.tree_util.keystr(path)), path
    for path, leaf in jax.tree_util.tree_leaves_with_path(of_ranking):
        assert np.any(leaf != 0) == ("score" in jax.tree_util.keystr(path)), path


@pytest.mark.long
def test_which_tokens_are_ranked_can_be_random():
    mixer, params, x = setup(impl="scan")
    loss = jax.jit(lambda key: ranking(params, x, mixer, rngs={"ranking": key}))
    drawn = {float(loss(jax.random.key(i))) for i in (0, 0, 1)}
    assert len(drawn) == 2


def distance_from_uniform(x):
    """Kolmogorov-Smirnov, on [0, 1]."""
    return np.abs(np.sort(x) - (np.arange(x.size) + 0.5) / x.size).max()


@pytest.mark.long
def test_initial_decays_are_those_of_mamba2_and_what_it_finds_counts_in_full():
    mixer = memzoo.make("hax", width=2, **{**FIELDS, "head_dim": 1})
    init = jax.jit(jax.vmap(lambda key: mixer.init(key, jnp.zeros((1, 1, 2)))))
    p = init(jax.random.split(jax.random.key(0), 300))["params"]  # of 4 heads each
    A, log_dt = np.exp(np.float64(p["A_log"]).ravel()), np.log(np.log1p(np.exp(np.float64(p["dt"]["bias"]).ravel())))
    assert distance_from_uniform((A - 1) / 15) < 0.06
    assert distance_from_uniform((log_dt - np.log(1e-3)) / np.log(100)) < 0.06
    assert (np.asarray(p["scale"]) == 1).all()


def test_the_state_holds_a_ring_for_each_bucket_and_the_selected():
    keys = jax.eval_shape(lambda: memzoo.make("hax", width=16).initial_state(1)).keys
    assert keys.kv_BSRZ.shape == (1, 256, 32, 128 + 32) and keys.selected_BMZ.shape == (1, 32, 128 + 32)


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"bucket_keys": 0}, "bucket_keys: expected an integer >= 1, got 0"),
        ({"selected_keys": 0}, "selected_keys: expected an integer >= 1, got 0"),
        ({"bits": 0}, "bits: expected an integer >= 1, got 0"),
        ({"bits": 17}, r"bits: expected at most 16, for 2\^bits buckets, got 17"),
        ({"seed": -1}, "seed: expected an integer >= 0, got -1"),
        ({"head_dim": 7}, "head_dim = 7"),
    ],
)
def test_fields_out_of_range(fields, says):
    with pytest.raises(ValueError, match=says):
        memzoo.make("hax", width=D, **fields)
