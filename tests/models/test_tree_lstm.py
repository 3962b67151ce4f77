"""Facts of the child-sum Tree-LSTM, arXiv:1503.00075, and how trees become levels.

Dims: B batch, N nodes, D width, F hidden, E = 4 F gates in the order i, f, u, o.
"""

import jax
import numpy as np
import pytest

from memzoo.mixers import lstm
from memzoo.models.tree_lstm import TreeLSTM, levels
from tests.initial import begins_as_in_torch

B, N, D, F = 3, 9, 4, 5
MODEL = TreeLSTM(width=D, hidden=F)
rng = np.random.default_rng(0)
x_BND = rng.normal(size=(B, N, D)).astype(np.float32)
# A bushy tree whose nodes are in no order, a path, and two trees with a node of padding.
parent_BN = np.array(
    [[4, 4, -1, 2, 2, 3, 4, 3, 5], [1, 2, 3, 4, 5, 6, 7, 8, -1], [2, 2, -1, -1, 3, 3, 4, 4, -1]], np.int32
)


@pytest.fixture(scope="module")
def tree():
    params = jax.jit(lambda key: MODEL.init(key, x_BND, parent_BN))(jax.random.key(0))["params"]
    params = jax.tree.map(lambda p: np.float32(p + 0.5 * rng.normal(size=p.shape)), params)
    return params, jax.jit(MODEL.apply)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_recursion(p, x, parent, node):
    """(h, c) of a node: the paper's equations, children first."""
    Wi, Wf, Wu, Wo = np.split(p["in"]["kernel"], 4, axis=1)
    Ui, Uf, Uu, Uo = np.split(p["recurrent"], 4, axis=1)
    bi, bf, bu, bo = np.split(p["in"]["bias"], 4)
    children = [by_recursion(p, x, parent, k) for k in np.nonzero(parent == node)[0]]
    s = sum((h for h, _ in children), np.zeros(F))
    of = x[node]
    i, o, u = sigmoid(of @ Wi + s @ Ui + bi), sigmoid(of @ Wo + s @ Uo + bo), np.tanh(of @ Wu + s @ Uu + bu)
    c = i * u + sum(sigmoid(of @ Wf + h @ Uf + bf) * c for h, c in children)
    return o * np.tanh(c), c


def test_is_the_recursion(tree):
    params, run = tree
    h_BNF, c_BNF = run({"params": params}, x_BND, parent_BN, levels(parent_BN))
    p = jax.tree.map(np.float64, params)
    for b in range(B):
        for n in range(N):
            h, c = by_recursion(p, x_BND[b], parent_BN[b], n)
            np.testing.assert_allclose(h_BNF[b, n], h, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(c_BNF[b, n], c, rtol=1e-4, atol=1e-5)


def test_a_path_is_an_lstm(tree):
    params, run = tree
    h_BNF, c_BNF = run({"params": params}, x_BND, parent_BN, levels(parent_BN))
    a_BNE = x_BND @ params["in"]["kernel"] + params["in"]["bias"]
    fresh = lstm.State(*np.zeros((2, 1, F), np.float32))
    want_BNF, last = jax.jit(lstm.lstm)(a_BNE[1:2], params["recurrent"], fresh)
    np.testing.assert_allclose(h_BNF[1], want_BNF[0], atol=1e-5)
    np.testing.assert_allclose(c_BNF[1, -1], last.c_BF[0], atol=1e-5)


def test_neither_the_order_of_children_nor_that_of_nodes_matters(tree):
    """Another numbering, in which children and all others change places, gives the same states, renumbered."""
    params, run = tree
    h_BNF, _ = run({"params": params}, x_BND, parent_BN, levels(parent_BN))
    order = rng.permutation(N)  # new node n was order[n]
    new = np.append(np.argsort(order), -1)  # old node n is new[n]
    h_other, _ = run({"params": params}, x_BND[:, order], new[parent_BN[:, order]], levels(new[parent_BN[:, order]]))
    np.testing.assert_allclose(h_other, h_BNF[:, order], atol=1e-5)


def test_a_node_sees_its_descendants_alone(tree):
    params, run = tree
    node_LBW = levels(parent_BN)
    h_BNF, _ = run({"params": params}, x_BND, parent_BN, node_LBW)
    for n in range(N):
        moved, _ = run({"params": params}, x_BND + np.float32(np.arange(N) == n)[:, None], parent_BN, node_LBW)
        changed_BN = np.abs(np.asarray(moved) - np.asarray(h_BNF)).max(-1) > 0
        for b in range(B):
            ancestors, up = {n}, parent_BN[b, n]
            while up >= 0:
                ancestors.add(up)
                up = parent_BN[b, up]
            assert set(np.nonzero(changed_BN[b])[0]) == ancestors


def test_gradients_are_difference_quotients(tree):
    params, _ = tree
    node_LBW = levels(parent_BN)
    with jax.enable_x64(True):
        model = MODEL.clone(dtype="float64", param_dtype="float64")
        arguments = jax.tree.map(np.float64, (params, x_BND))
        weights = rng.normal(size=(2, B, N, F))

        def loss(arguments):
            h_BNF, c_BNF = model.apply({"params": arguments[0]}, arguments[1], parent_BN, node_LBW)
            return (weights[0] * h_BNF + weights[1] * c_BNF).sum()

        run = jax.jit(jax.value_and_grad(loss))
        along = jax.tree.map(lambda a: rng.normal(size=a.shape), arguments)
        at = lambda e: run(jax.tree.map(lambda a, d: a + e * d, arguments, along))
        slope = sum(np.sum(g * d) for g, d in zip(*map(jax.tree.leaves, (at(0.0)[1], along)), strict=True))
        np.testing.assert_allclose((at(1e-6)[0] - at(-1e-6)[0]) / 2e-6, slope, rtol=1e-6)


def test_levels_are_heights():
    node_LBW = levels(parent_BN)
    assert node_LBW.shape == (N, B, 6)
    assert [sorted(set(nodes[0]) - {N}) for nodes in node_LBW[:5]] == [[0, 1, 6, 7, 8], [4, 5], [3], [2], []]
    assert [sorted(set(nodes[2]) - {N}) for nodes in node_LBW[:4]] == [[0, 1, 5, 6, 7, 8], [2, 4], [3], []]
    np.testing.assert_array_equal(levels([[-1, -1]]), [[[0, 1]]])


def test_initial_parameters():
    """Uniform in +-1/sqrt(inputs)."""
    model, x = TreeLSTM(width=30, hidden=40), np.ones((1, 1, 30), np.float32)
    params = jax.jit(lambda key: model.init(key, x, np.array([[-1]])))(jax.random.key(0))["params"]
    assert begins_as_in_torch(params["in"]["kernel"], 30) and begins_as_in_torch(params["in"]["bias"], 30)
    assert begins_as_in_torch(params["recurrent"], 40)


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ([[1, 0]], "parent_BN: expected trees, got a node of row 0 that is its own ancestor"),
        ([[-1, -1], [-1, 1]], "parent_BN: expected trees, got a node of row 1 that is its own ancestor"),
        ([[2, -1]], "parent_BN: expected nodes in 0 ... N - 1 = 1, or -1, got 2"),
        ([[-2, -1]], "or -1, got -2"),
        ([0, -1], r"parent_BN: expected integers of shape \[B, N >= 1\], got int64\[2\]"),
        ([[0.0, -1.0]], "parent_BN: expected integers"),
    ],
)
def test_what_is_no_tree_is_refused(parents, message):
    with pytest.raises(ValueError, match=message):
        levels(parents)


def test_bad_arguments_are_named(tree):
    params, run = tree
    params = {"params": params}
    with pytest.raises(ValueError, match=r"x_BND: expected shape \[B, N >= 1, D = 4\], got \[3, 9, 3\]"):
        MODEL.apply(params, x_BND[..., 1:], parent_BN)
    with pytest.raises(ValueError, match=r"parent_BN: expected shape \[B = 3, N = 9\], got \[3, 8\]"):
        MODEL.apply(params, x_BND, parent_BN[:, 1:])
    with pytest.raises(ValueError, match=r"node_LBW: under jit, expected levels\(parent_BN\), got None"):
        run(params, x_BND, parent_BN)
    with pytest.raises(ValueError, match=r"node_LBW: expected shape \[L, B = 3, W\], got \[9, 2, 6\]"):
        run(params, x_BND, parent_BN, levels(parent_BN)[:, 1:])
    with pytest.raises(ValueError, match="hidden: expected an integer >= 1, got 0"):
        MODEL.clone(hidden=0).apply(params, x_BND, parent_BN)
