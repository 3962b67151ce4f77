"""Generation: what greedy decoding must equal, how samples are distributed, and what must not be compiled twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memzoo.models.backbone import LanguageModel
from memzoo.sample import choose, decode, generate, left_pad, prefill

B, T, S, D, Z = 3, 5, 7, 12, 11
KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def model():
    fields = {"gated_deltanet": {"heads": 2, "key_dim": 3, "value_dim": 4, "impl": "scan"}}
    return LanguageModel(vocab=Z, width=D, layers=2, fields=fields)


@pytest.fixture(scope="module")
def params(model):
    return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


@pytest.fixture(scope="module")
def prompt_BT():
    return jax.random.randint(jax.random.key(2), (B, T), 0, Z)


@pytest.fixture(scope="module")
def greedy(model, params, prompt_BT):
    return generate(model, params, prompt_BT, S, KEY, temperature=0)


@pytest.fixture(scope="module")
def logits_BZ():
    return 2 * jax.random.normal(jax.random.key(3), (4, Z))


@pytest.mark.long
def test_greedy_is_the_argmax_of_one_teacher_forced_call(model, params, prompt_BT, greedy):
    whole = jnp.concatenate([prompt_BT, greedy.tokens_BS], axis=1)
    logits_BTZ, _ = jax.jit(model.apply)(params, whole)
    assert (logits_BTZ[:, T - 1 : -1].argmax(-1) == greedy.tokens_BS).all()
    assert len(np.unique(greedy.tokens_BS)) > 3  # a model that repeats itself would pass anything
    assert (greedy.lengths_B == S).all()


@pytest.mark.long
def test_going_on_from_the_state_equals_one_longer_call(model, params, prompt_BT, greedy):
    first = generate(model, params, prompt_BT, 4, KEY, temperature=0)
    for _ in range(2):  # the state is a value: using it once does not use it up
        second = generate(model, params, first.last_B1, S - 4, KEY, temperature=0, state=first.state)
        assert (jnp.concatenate([first.tokens_BS, second.tokens_BS], 1) == greedy.tokens_BS).all()
    np.testing.assert_allclose(second.state[1].S_BHKV, greedy.state[1].S_BHKV, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_left_padding_equals_separate_prompts(model, params, prompt_BT, greedy):
    rows = [prompt_BT[0], prompt_BT[1, 2:], prompt_BT[2, 4:]]
    tokens_BT, reset_BT = left_pad(rows)
    assert tokens_BT.shape == reset_BT.shape == (B, T) and reset_BT.sum() == B
    together = generate(model, params, tokens_BT, S, KEY, temperature=0, reset_BT=reset_BT)
    assert (together.tokens_BS[0] == greedy.tokens_BS[0]).all()
    for row, tokens_S in zip(rows[1:], together.tokens_BS[1:], strict=True):
        alone = generate(model, params, row[None], S, KEY, temperature=0)
        assert (alone.tokens_BS[0] == tokens_S).all()


@pytest.mark.long
def test_a_row_ends_at_its_stop_token(model, params, prompt_BT, greedy):
    free_BS = np.asarray(greedy.tokens_BS)
    stop = int(free_BS[0, 2])
    got = generate(model, params, prompt_BT, S, KEY, temperature=0, stop=stop)
    for b in range(B):
        places = np.flatnonzero(free_BS[b] == stop)
        length = places[0] + 1 if places.size else S
        assert got.lengths_B[b] == length
        assert (got.tokens_BS[b, :length] == free_BS[b, :length]).all() and (got.tokens_BS[b, length:] == stop).all()
    assert got.lengths_B.min() < S

    # The state of a row that ended is of its end, not of the stop tokens after it.
    n = int(got.lengths_B[0])
    seen = jnp.concatenate([prompt_BT[:1], free_BS[:1, : n - 1]], axis=1)
    _, state = jax.jit(model.apply)(params, seen)
    np.testing.assert_allclose(got.state[1].S_BHKV[0], state[1].S_BHKV[0], rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_nothing_is_computed_after_all_rows_have_ended(model, params, prompt_BT, greedy):
    stop = int(greedy.tokens_BS[0, 0])
    long = generate(model, params, prompt_BT[:1], 10**6, KEY, temperature=0, stop=stop)
    assert long.lengths_B == 1 and (long.tokens_BS == stop).all()


def test_one_compilation_for_all_keys_temperatures_and_probabilities(model, params, prompt_BT, greedy):
    generate(model, params, prompt_BT, S, KEY, 1.0, None, 0.9)
    before = prefill._cache_size(), decode._cache_size()
    for key, temperature, top_p in ((1, 0.5, 0.3), (2, 1, 1), (3, 0, jnp.float32(0.5))):
        generate(model, params, prompt_BT, S, jax.random.key(key), temperature, None, top_p)
    assert (prefill._cache_size(), decode._cache_size()) == before


def test_decoding_keeps_nothing_of_its_past(model, params, prompt_BT):
    """Ten times the steps takes ten times the tokens, and not a byte more of anything else."""

    def temporary(steps):
        logits_BZ, state = jax.eval_shape(lambda: prefill(model, params, prompt_BT, None, None))
        lowered = decode.lower(model, params, logits_BZ, state, KEY, 1.0, None, steps=steps, top_k=None, stop=None)
        memory = lowered.compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    assert temporary(1000) - temporary(100) <= 2 * 900 * B * 4


def test_the_same_key_gives_the_same_text_and_another_another(model, params, prompt_BT):
    a, b, c = (generate(model, params, prompt_BT, S, jax.random.key(k)).tokens_BS for k in (1, 1, 2))
    assert (a == b).all() and (a != c).any()


def test_temperature_0_and_sets_of_one_are_the_argmax(logits_BZ):
    want = logits_BZ.argmax(-1)
    cold = {"temperature": 1e-30}  # so small that its inverse is infinite
    for settings in ({"temperature": 0}, cold, {"top_k": 1}, {"top_p": 1e-6}, {"top_k": 1, "top_p": 1.0}):
        assert (choose(logits_BZ, KEY, **settings) == want).all(), settings


def test_ties_go_to_the_smaller_token():
    level_BZ = jnp.zeros((1, Z)).at[0, jnp.array([4, 7])].set(1.0)
    for settings in ({"temperature": 0}, {"top_k": 1}, {"top_p": 1e-6}):
        assert choose(level_BZ, KEY, **settings) == 4


def allowed_probabilities(logits_Z, temperature, top_k, top_p):
    """From the definition, in float64: sort, keep the k first, keep the fewest that hold top_p, normalise."""
    p = np.exp(np.asarray(logits_Z, np.float64) / temperature)
    order = np.argsort(-p)
    keep = order[: top_k or len(p)]
    share = np.cumsum(p[keep]) / p[keep].sum()
    keep = keep[: np.searchsorted(share, top_p or 1.0) + 1]
    return np.where(np.isin(np.arange(len(p)), keep), p, 0) / p[keep].sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, None), (0.6, None, None), (1.5, 4, None), (1.0, None, 0.8), (1.3, 5, 0.7), (2.0, Z, 1.0)],
)
def test_samples_are_distributed_as_the_definition_says(logits_BZ, temperature, top_k, top_p):
    n = 20_000
    many = jnp.broadcast_to(logits_BZ[1], (n, Z))
    counts = np.bincount(np.asarray(choose(many, KEY, temperature, top_k, top_p)), minlength=Z)
    want = n * allowed_probabilities(logits_BZ[1], temperature, top_k, top_p)
    assert (counts[want == 0] == 0).all()
    kept = want > 0
    chi2 = ((counts - want)[kept] ** 2 / want[kept]).sum()
    assert chi2 < 32  # 10 degrees of freedom at most: the chance of more is 4e-4, and the key is fixed


def test_nucleus_is_the_smallest_set_with_enough_probability():
    logits_BZ = jnp.log(jnp.array([[0.1, 0.5, 0.15, 0.25]]))
    many = jnp.broadcast_to(logits_BZ, (500, 4))
    for top_p, want in ((0.4, {1}), (0.51, {1, 3}), (0.74, {1, 3}), (0.76, {1, 3, 2}), (1.0, {0, 1, 2, 3})):
        assert set(np.asarray(choose(many, KEY, top_p=top_p)).tolist()) == want


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps: expected an integer >= 1, got 0"),
        ({"temperature": -0.1}, "temperature: expected a number >= 0, got -0.1"),
        ({"temperature": float("nan")}, "temperature: expected a number >= 0, got nan"),
        ({"top_k": 0}, "top_k: expected 1 ... vocab = 11, got 0"),
        ({"top_k": Z + 1}, "top_k: expected 1 ... vocab = 11, got 12"),
        ({"top_p": 0.0}, r"top_p: expected a number in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, r"top_p: expected a number in \(0, 1\], got 1.1"),
        ({"stop": Z}, "stop: expected a token in 0 ... vocab - 1 = 10, got 11"),
        ({"prompt_BT": jnp.full((B, T), Z)}, "prompt_BT: expected tokens in 0 ... vocab - 1 = 10, got 11"),
        ({"prompt_BT": jnp.zeros((B, 0), int)}, r"prompt_BT: expected shape \[B, T >= 1\], got \[3, 0\]"),
        ({"prompt_BT": jnp.zeros(T, int)}, r"prompt_BT: expected shape \[B, T >= 1\], got \[5\]"),
        ({"reset_BT": jnp.zeros((B, T + 1), bool)}, r"reset_BT: expected shape \[B = 3, T = 5\], got \[3, 6\]"),
        ({"state": ()}, "state: expected a tuple of the states of 2 layers, got 0 of them"),
    ],
)
def test_bad_arguments_are_named(model, params, prompt_BT, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(model, params, **{"prompt_BT": prompt_BT, "steps": S, "key": KEY, **settings})


@pytest.mark.parametrize("prompts", [[], [[1], []]])
def test_left_pad_needs_a_token_in_each_prompt(prompts):
    with pytest.raises(ValueError, match="prompts: expected at least one, and a token in each"):
        left_pad(prompts)


def test_left_pad_needs_integers():
    with pytest.raises(ValueError, match=r"prompts\[1\]: expected integers, got float64"):
        left_pad([[1, 2], [0.5]])
