"""Tree-LSTM: an LSTM over trees, in which a node forgets each child's cell by a gate of its own and sums what is left.

    s = sum of h_k over the children k of a node        i, o = sigmoid(W x + U s + b)        u = tanh(W x + U s + b)
    c = i u + sum_k f_k c_k                             f_k = sigmoid(W x + U h_k + b)       h = o tanh(c)

each gate with its own W, U and b. A leaf has s = 0 and no f. Nodes of the same height are computed together, the
leaves first, so that a batch takes as many steps as its highest tree is high.

Source: Tai, Socher, Manning, "Improved Semantic Representations From Tree-Structured Long Short-Term Memory Networks"
(2015), arXiv:1503.00075, sec. 3.1, eq. 2-8 (the child-sum Tree-LSTM).
Differs: one bias each, where the released code adds two; weights begin as its are, PyTorch's and Torch7's default.

Dims: B batch, N nodes, O = N + 1: a node more, for what comes from none and goes to none, L levels, W nodes of a level,
D width, F hidden, E = 4 F gates in the order i, f, u, o. Recurrent kernels [F, E] go from units to gates.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memzoo import contract
from memzoo.ops.initial import like_torch, within


def levels(parent_BN: Any) -> np.ndarray:
    """The nodes of each height, node_LBW, in NumPy: from the leaves on, filled up with N, which is no node.

    parent_BN: integers, the parent of each node, in any order, and -1 for a root. A row may hold several trees; its
    padding is nodes of parent -1, trees by themselves that nobody asks about.
    Raises ValueError for the wrong shape or dtype, for parents outside of the row, for a node that is its own ancestor.
    """
    parent_BN = np.asarray(parent_BN)
    if parent_BN.ndim != 2 or 0 in parent_BN.shape or not np.issubdtype(parent_BN.dtype, np.integer):
        got = f"{parent_BN.dtype}{list(parent_BN.shape)}"
        raise ValueError(f"parent_BN: expected integers of shape [B, N >= 1], got {got}")
    B, N = parent_BN.shape
    wrong = parent_BN[(parent_BN < -1) | (parent_BN >= N)]
    if wrong.size:
        raise ValueError(f"parent_BN: expected nodes in 0 ... N - 1 = {N - 1}, or -1, got {wrong[0]}")
    rows_B1, parent_BN = np.arange(B)[:, None], np.where(parent_BN < 0, N, parent_BN)
    waiting_BO = np.zeros((B, N + 1), int)  # of its children, how many have no level yet
    np.add.at(waiting_BO, (rows_B1, parent_BN), 1)
    waiting_BO[:, N] = -1
    found = []
    while (waiting_BO >= 0).any():
        b, n = np.nonzero(waiting_BO == 0)
        if not b.size:
            row = np.nonzero((waiting_BO >= 0).any(1))[0][0]
            raise ValueError(f"parent_BN: expected trees, got a node of row {row} that is its own ancestor")
        waiting_BO[b, n] = -1
        inner = parent_BN[b, n] < N
        np.subtract.at(waiting_BO, (b[inner], parent_BN[b, n][inner]), 1)
        found.append((b, n))
    W = max(np.bincount(b).max() for b, _ in found)
    node_LBW = np.full((len(found), B, W), N, np.int32)
    for node_BW, (b, n) in zip(node_LBW, found, strict=True):
        node_BW[b, np.arange(b.size) - np.searchsorted(b, b)] = n
    return node_LBW


def step(a_E, s_F, kept_F, U_FE):
    """One node, from s and the sum of f_k c_k; a = W x + b. Returns h and c."""
    i_F, _, u_F, o_F = jnp.split(a_E + s_F @ U_FE, 4)
    c_F = nn.sigmoid(i_F) * jnp.tanh(u_F) + kept_F
    return nn.sigmoid(o_F) * jnp.tanh(c_F), c_F


def keep(a_E, h_F, c_F, U_FE):
    """What a node keeps of a child's cell: f_k c_k, from the node's a and the child's h and c."""
    F = h_F.size
    return nn.sigmoid(a_E[F : 2 * F] + h_F @ U_FE[:, F : 2 * F]) * c_F


class TreeLSTM(nn.Module):
    """x_BND, parent_BN -> (h_BNF, c_BNF), of every node; float32, or float64 when `dtype` is.

    node_LBW: levels(parent_BN), which is worked out where it is not given; under `jit`, where parents have no values,
    it has to be. Raises ValueError, by name, for sizes below 1, and for inputs or trees that do not fit.
    """

    width: int
    hidden: int | None = None  # F; width
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x_BND: jax.Array, parent_BN: jax.Array, node_LBW: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        F = self.hidden if self.hidden is not None else self.width
        contract.positive(width=self.width, hidden=F)
        node_LBW = check(x_BND, parent_BN, node_LBW, self.width)
        wide = contract.state_dtype(self.dtype)

        dot = partial(lax.dot_general, preferred_element_type=wide)
        inits: dict[str, Any] = {"kernel_init": like_torch, "bias_init": within(self.width**-0.5), "dot_general": dot}
        a_BNE = nn.Dense(4 * F, name="in", dtype=self.dtype, param_dtype=self.param_dtype, **inits)(x_BND).astype(wide)
        U_FE = self.param("recurrent", like_torch, (F, 4 * F), self.param_dtype).astype(wide)
        with jax.default_matmul_precision("highest"):
            return jax.vmap(tree_lstm, (0, 0, 1, None))(a_BNE, jnp.asarray(parent_BN), node_LBW, U_FE)


def tree_lstm(a_NE, parent_N, node_LW, U_FE):
    """All nodes of one row, level by level. Returns (h_NF, c_NF)."""
    N, F = len(a_NE), U_FE.shape[0]
    a_OE = jnp.pad(a_NE, ((0, 1), (0, 0)))
    parent_O = jnp.append(jnp.where(parent_N < 0, N, parent_N), N)

    def level(carry, n_W):
        s_OF, kept_OF, h_OF, c_OF = carry
        h_WF, c_WF = jax.vmap(step, (0, 0, 0, None))(a_OE[n_W], s_OF[n_W], kept_OF[n_W], U_FE)
        p_W = parent_O[n_W]
        kept_WF = jax.vmap(keep, (0, 0, 0, None))(a_OE[p_W], h_WF, c_WF, U_FE)
        s_OF, kept_OF = s_OF.at[p_W].add(h_WF), kept_OF.at[p_W].add(kept_WF)
        return (s_OF, kept_OF, h_OF.at[n_W].set(h_WF), c_OF.at[n_W].set(c_WF)), None

    (_, _, h_OF, c_OF), _ = lax.scan(level, (jnp.zeros((N + 1, F), a_NE.dtype),) * 4, node_LW)
    return h_OF[:N], c_OF[:N]


def check(x_BND, parent_BN, node_LBW, width):
    """node_LBW, after checking that all three fit."""
    if np.ndim(x_BND) != 3 or np.shape(x_BND)[-1] != width or np.shape(x_BND)[1] == 0:
        raise ValueError(f"x_BND: expected shape [B, N >= 1, D = {width}], got {list(np.shape(x_BND))}")
    if not jnp.issubdtype(x_BND.dtype, jnp.floating):
        raise ValueError(f"x_BND: expected a floating dtype, got {x_BND.dtype}")
    B, N, _ = x_BND.shape
    if np.shape(parent_BN) != (B, N):
        raise ValueError(f"parent_BN: expected shape [B = {B}, N = {N}], got {list(np.shape(parent_BN))}")
    if node_LBW is None:
        if isinstance(parent_BN, jax.core.Tracer):
            raise ValueError("node_LBW: under jit, expected levels(parent_BN), got None")
        return levels(parent_BN)
    if np.ndim(node_LBW) != 3 or np.shape(node_LBW)[1] != B:
        raise ValueError(f"node_LBW: expected shape [L, B = {B}, W], got {list(np.shape(node_LBW))}")
    return node_LBW
