"""What the three Titans have in common. All laws of models, in test_laws.py, hold them to more; those take longer.

Dims: B batch, T time, D width, Z vocabulary.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memzoo.models.backbone import describe
from memzoo.models.titans_mac import TitansMAC
from memzoo.models.titans_mag import TitansMAG
from memzoo.models.titans_mal import TitansMAL
from tests.window import drawn

B, T, D, Z = 2, 10, 12, 11
MODELS = {
    "titans_mac": (TitansMAC, "segment"),
    "titans_mag": (TitansMAG, "window"),
    "titans_mal": (TitansMAL, "window"),
}
NAMES = tuple(MODELS)


def make(name, reach=4, **fields):
    model, sees = MODELS[name]
    sizes = {"layers": 1, "heads": 2, "persistent": 2, "hidden": 7, "memory": {"chunk": 3, "hidden": 5}}
    return model(**{"vocab": Z, "width": D, **sizes, sees: reach, **fields})


@functools.cache
def setup(name):
    """The model, jitted: (tokens, state, reset, params) -> logits, state; and tokens."""
    model, rng = make(name), np.random.default_rng(0)
    tokens = rng.integers(0, Z, (B, T)).astype(np.int32)
    params = drawn(model)
    fresh, run = jax.tree.map(np.asarray, model.initial_state(B)), jax.jit(model.apply)

    def apply(tokens, state=fresh, reset=None, params=params):
        reset = np.zeros(tokens.shape, bool) if reset is None else reset
        return jax.tree.map(np.asarray, run(params, tokens, state, reset))

    return apply, params, tokens


def assert_close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * (1 + np.abs(b).max())), got, want)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.cases(1)
def test_pieces_are_the_whole(name):
    """Token by token, after another text that ended inside of a segment and a chunk. The state is no larger for it."""
    apply, _, tokens = setup(name)
    _, before = apply(tokens[::-1, ::-1])
    whole, last = apply(tokens, before)
    state, ys = before, []
    for t in range(T):
        y, state = apply(tokens[:, t : t + 1], state)
        ys.append(y)
    assert_close((np.concatenate(ys, axis=1), state), (whole, last))
    assert jax.tree.map(jnp.shape, last) == jax.tree.map(jnp.shape, make(name).initial_state(B))


@pytest.mark.parametrize("name", NAMES)
def test_a_reset_begins_a_new_text(name):
    """Whatever was there before it. Segments and chunks begin anew."""
    apply, _, tokens = setup(name)
    nonsense = jax.tree.map(lambda s: np.full_like(s, np.nan if s.dtype == np.float32 else 2), apply(tokens)[1])
    starts, reset = ((0, 5), (0, 1, 2)), np.zeros((B, T), bool)
    for row in range(B):
        reset[row, list(starts[row])] = True
    y, _ = apply(tokens, nonsense, reset)
    for row in range(B):
        for start, end in itertools.pairwise((*starts[row], T)):
            alone, _ = apply(np.roll(tokens, -start, axis=1))
            assert_close(y[row, start:end], alone[row, : end - start])


@pytest.mark.parametrize("name", NAMES)
def test_sees_the_past_alone_and_all_of_it(name):
    apply, _, tokens = setup(name)
    y, _ = apply(tokens)
    for t in range(T):
        other, _ = apply(np.where(np.arange(T) == t, (tokens + 1) % Z, tokens))
        changed_T = np.abs(other - y).max(axis=(0, 2))
        assert (changed_T[:t] < 1e-6).all() and (changed_T[t:] > 1e-5).all(), (t, changed_T)


@pytest.mark.parametrize("name", NAMES)
def test_persistent_tokens_are_seen_by_all(name):
    apply, params, tokens = setup(name)
    moved = lambda path, p: p + 1 if path[-1].key == "persistent" else p
    other = jax.tree_util.tree_map_with_path(moved, params)
    assert (np.abs(apply(tokens, params=other)[0] - apply(tokens)[0]).max(axis=(0, 2)) > 1e-4).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.cases(1)
def test_sizes(name):
    """Each reach more is, for each layer, a key and a value more; heads of the memory may be others."""
    bytes_of = lambda reach, layers: describe(make(name, reach, layers=layers)).state_bytes
    assert bytes_of(9, 3) == 3 * bytes_of(9, 1)
    assert bytes_of(9, 1) - bytes_of(8, 1) == bytes_of(8, 1) - bytes_of(7, 1) >= 2 * D * 4
    memory = make(name, memory={"heads": 3, "chunk": 3}).initial_state(1)[0].memory
    assert {3} == {W.shape[1] for W in jax.tree.leaves(getattr(memory, "memory", memory).A)}


@pytest.mark.parametrize("name", NAMES)
def test_bad_fields_are_named(name):
    for match, fields in {
        "layers: expected an integer >= 1, got 0": {"layers": 0},
        "hidden: expected an integer >= 1, got 0": {"hidden": 0},
        "width: expected a positive multiple of heads = 5, got 12": {"heads": 5},
        "heads: expected an even width / heads, to turn pairs, got 12 / 4": {"heads": 4},
        f"{MODELS[name][1]}: expected an integer >= 1, got 0": {"reach": 0},
        "persistent: expected an integer >= 0, got -1": {"persistent": -1},
        "memory: 'width' is that of the model": {"memory": {"width": 8}},
        "deptth: titans has no such field; did you mean depth": {"memory": {"deptth": 1}},
        "chunk: expected an integer >= 1, got 0": {"memory": {"chunk": 0}},
        "impl: expected one of auto, scan, chunk; got 'chunks', did you mean chunk": {"impl": "chunks"},
    }.items():
        with pytest.raises(ValueError, match=match):
            make(name, **fields)
    with pytest.raises(NotImplementedError, match="titans has no form 'associative'"):
        make(name, impl="associative")


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_no_persistent_tokens_and_remat(name):
    """Layers run without the first, and the second changes nothing."""
    _, _, tokens = setup(name)
    model = make(name, persistent=0)
    params = drawn(model)
    assert not any("persistent" in str(path) for path, _ in jax.tree_util.tree_leaves_with_path(params))
    loss = lambda model: jax.jit(jax.grad(lambda p: (model.apply(p, tokens)[0] ** 2).sum()))(params)
    assert_close(loss(model), loss(make(name, persistent=0, remat=True)))


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_the_first_loss_is_near_that_of_a_uniform_guess(name):
    model = make(name, vocab=65, width=64, layers=2, hidden=None, memory={})
    tokens = np.random.default_rng(1).integers(0, 65, (4, 33))
    (logits, _), _ = jax.jit(model.init_with_output)(jax.random.key(0), tokens[:, :-1])
    nats = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), tokens[:, 1:, None], -1).mean()
    assert abs(nats - np.log(65)) < 0.6
