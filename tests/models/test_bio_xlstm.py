"""Facts of Bio-xLSTM, arXiv:2411.04165: DNA on both strands, proteins by their places, the size for molecules.

Dims: B batch, T time, D width, Z vocabulary.
"""

from functools import partial

import jax
import numpy as np
import pytest

from memzoo.models import bio_xlstm
from memzoo.models.backbone import describe
from memzoo.models.bio_xlstm import COMPLEMENT, DNAxLSTM, ProtXLSTM, chem_xlstm
from memzoo.models.xlstm import MatrixBlock, ScalarBlock
from tests.models.test_xlstm import layer_norm
from tests.test_contract import assert_close, in_numpy, largest

B, T, D, Z = 2, 12, 8, 12
SIZES = {"width": D, "layers": 2, "ratio": "1:1", "heads": 2, "inner": 16, "hidden": 7}
rng = np.random.default_rng(0)
TOKENS = rng.integers(7, 12, (B, T)).astype(np.int32)
RC = np.array(COMPLEMENT)[TOKENS[:, ::-1]]
WHOLE = np.zeros((B, T), bool)  # one sequence a row


def drawn(model):
    """Any parameters: the initial ones are tested elsewhere."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    return jax.tree.map(lambda p: (0.5 * rng.standard_normal(p.shape)).astype(p.dtype), shapes)


@pytest.fixture(scope="module")
def dna():
    model = DNAxLSTM(**SIZES, strands=True)
    params, run = drawn(model), jax.jit(model.apply)
    return model, params, lambda tokens, reset=WHOLE: np.asarray(run(params, tokens, reset))


def test_complements():
    """A and T, C and G; the others are their own; twice is nothing."""
    np.testing.assert_array_equal(bio_xlstm.reverse_complement(TOKENS), RC)
    np.testing.assert_array_equal(bio_xlstm.reverse_complement(RC), TOKENS)
    letters = dict(zip("ACGTN", range(7, 12), strict=True))
    other = "".join("ACGTN"[COMPLEMENT[letters[z]] - 7] for z in "GATTACAN")
    assert other == "CTAATGTN" and COMPLEMENT[:7] == tuple(range(7))


@pytest.mark.long
def test_shared_strands_are_equivariant(dna):
    _, _, run = dna
    there, back = run(TOKENS), run(RC)
    np.testing.assert_allclose(back, there[:, ::-1][..., COMPLEMENT], atol=1e-5 * largest(there))
    assert largest(back - there) > 0.1 * largest(there), "the test itself"


@pytest.mark.long
def test_shared_strands_are_halves_of_channels(dna):
    """As in Caduceus: 2 D channels, the second half reversed in time and channels, each layer applied to both."""
    model, params, run = dna
    p = params["params"]
    both = lambda z: z[:, ::-1, ::-1]

    def wrapped(f, x):
        return np.concatenate([f(x[..., :D]), both(f(both(x[..., D:])))], -1)

    x = np.concatenate([p["embedding"][TOKENS], both(p["embedding"][RC])], -1)
    for l, (kind, fields) in enumerate(model.blocks()):
        apply = jax.jit(partial(kind(**fields).apply, {"params": p[f"layer_{l}"]}))
        one_way = lambda z, apply=apply: np.asarray(apply(z, None, np.zeros((B, T), bool))[0])
        x = wrapped(lambda z, one_way=one_way: one_way(z) + one_way(z[:, ::-1])[:, ::-1], x)
    x = wrapped(lambda z: layer_norm(z, p["norm"]), x)
    head_ZD = p["head"].T
    want = x[..., :D] @ head_ZD.T + x[..., D:][..., ::-1] @ head_ZD[list(COMPLEMENT)].T
    np.testing.assert_allclose(run(TOKENS), want, atol=1e-4 * largest(want))


def test_conjoined_is_equivariant_after_training():
    """Whatever was trained: here sums of what a token and those before it say, which are not."""
    says_ZZ = rng.standard_normal((Z, Z))
    read = lambda tokens: np.cumsum(says_ZZ[np.asarray(tokens)], axis=1)
    alone, back = read(TOKENS), read(RC)
    assert largest(back - alone[:, ::-1][..., COMPLEMENT]) > 0.1 * largest(alone)
    joined = np.asarray(bio_xlstm.conjoined(read, TOKENS))
    np.testing.assert_allclose(joined, (alone + back[:, ::-1][..., COMPLEMENT]) / 2, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(bio_xlstm.conjoined(read, RC), joined[:, ::-1][..., COMPLEMENT], atol=1e-5)


@pytest.mark.long
def test_all_are_seen_from_both_ends_and_sequences_apart(dna):
    """A change anywhere moves all logits of its own sequence, before and after, and none of the other's."""
    _, _, run = dna
    reset = np.arange(T)[None].repeat(B, 0) == 5
    y = run(TOKENS, reset)
    for t, own in ((2, slice(0, 5)), (9, slice(5, T))):
        moved = run(np.where(np.arange(T) == t, 7 + (TOKENS - 6) % 4, TOKENS), reset)
        changed_T = np.abs(moved - y).max((0, 2))
        assert np.all(changed_T[own] > 1e-5 * largest(y))
        changed_T[own] = 0
        assert not np.any(changed_T)


def test_either_strand_is_one_of_the_two():
    tokens = np.tile(TOKENS[:1], (200, 1))
    either = np.asarray(jax.jit(bio_xlstm.either_strand)(jax.random.key(0), tokens))
    same, other = (either == TOKENS[0]).all(1), (either == RC[0]).all(1)
    assert np.all(same | other) and 70 < same.sum() < 130


PROT = ProtXLSTM(30, D, 2, heads=2, inner=16, start=0, masks=(25, 26), impl="scan")


@pytest.fixture(scope="module")
def prot():
    tokens = rng.integers(4, 25, (B, T)).astype(np.int32)
    tokens[:, [0, 7]], tokens[0, 3], tokens[1, 10] = 0, 25, 26
    params, run = drawn(PROT), jax.jit(PROT.apply)
    return tokens, params, lambda p, z, state=None, reset=WHOLE, place=None: in_numpy(run(p, z, state, reset, place))


@pytest.mark.long
def test_places_are_counted_from_the_start_of_a_protein(prot):
    """Masks take the place of what comes next; a call goes on where the last one ended; resets begin at 0."""
    tokens, params, run = prot
    place = np.array([[0, 1, 2, 3, 3, 4, 5, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 3]], np.int32)
    fresh = in_numpy(PROT.initial_state(B))
    y, last = run(params, tokens, fresh)
    assert_close((y, last), run(params, tokens, place=place), 1e-6)
    np.testing.assert_array_equal(last[-1], [5, 4])
    assert largest(run(params, tokens, place=place + np.arange(T, dtype=np.int32))[0] - y) > 1e-3 * largest(y)

    reset = np.arange(T)[None].repeat(B, 0) == 6
    whole, at_end = run(params, tokens, fresh, reset)
    parts, state = [], fresh
    for t in range(T):
        part, state = run(params, tokens[:, t : t + 1], state, reset[:, t : t + 1])
        parts.append(part)
    assert_close((np.concatenate(parts, 1), state), (whole, at_end), 1e-5)
    alone, _ = run(params, np.roll(tokens, -6, axis=1), fresh)
    np.testing.assert_allclose(whole[:, 6:], alone[:, :6], atol=1e-5 * largest(whole))
    assert jax.tree.map(np.shape, fresh) == jax.tree.map(np.shape, at_end)


def test_only_distances_in_place_matter(prot):
    """Rotary places: all of them moved by the same gives the same where gates do not see q and k."""
    tokens, params, run = prot
    params = jax.tree_util.tree_map_with_path(
        lambda path, p: 0 * p if any(g in jax.tree_util.keystr(path) for g in ("'input']['k", "'forget']['k")) else p,
        params,
    )
    place = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    y, far = (run(params, tokens, place=place + n)[0] for n in (0, 1000))
    np.testing.assert_allclose(far, y, atol=1e-3 * largest(y))


def test_the_size_for_molecules():
    model = chem_xlstm()
    assert round(describe(model).parameters / 1e6, 1) == 14.8
    assert {kind for kind, _ in model.blocks()} == {MatrixBlock}
    assert {kind for kind, _ in DNAxLSTM().blocks()} == {ScalarBlock} and DNAxLSTM().blocks()[0][1]["hidden"] == 280


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DNAxLSTM(complement=(0, 2)), r"complement: expected a permutation of 0 ... Z - 1, got \(0, 2\)"),
        (lambda: DNAxLSTM(complement=(1, 2, 0)), "complement: expected pairs, got 0 -> 1 -> 2"),
        (lambda: DNAxLSTM(strands=1), "strands: expected True or False, got 1"),
        (lambda: DNAxLSTM(width=10, heads=4), "width: expected a positive multiple of heads = 4, got 10"),
        (lambda: ProtXLSTM(masks=(38,)), r"masks: expected tokens in 0 ... vocab - 1 = 37, got \(38,\)"),
        (lambda: ProtXLSTM(start=-1), "start: expected tokens in 0"),
        (
            lambda: ProtXLSTM(heads=1, inner=15, qkv_block=5),
            "inner: expected a positive multiple of a pair of channels",
        ),
        (lambda: ProtXLSTM(rotary_base=0.0), "rotary_base: expected a number > 0, got 0.0"),
    ],
)
def test_bad_fields_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_arguments_are_named(dna, prot):
    model, params, _ = dna
    with pytest.raises(ValueError, match=r"tokens_BT: expected tokens in 0 ... vocab - 1 = 11, got 12"):
        model.apply(params, TOKENS + 1)
    with pytest.raises(ValueError, match=r"reset_BT: expected shape \[B = 2, T = 12\], got \[2, 11\]"):
        model.apply(params, TOKENS, np.zeros((B, T - 1), bool))
    tokens, params, _ = prot
    with pytest.raises(
        ValueError, match=r"place_BT: expected integers of shape \[B = 2, T = 12\], got float32\[2, 12\]"
    ):
        PROT.apply(params, tokens, None, None, np.zeros((B, T), np.float32))
    with pytest.raises(ValueError, match="state: expected a tuple of the states of 3 layers"):
        PROT.apply(params, tokens, [])
