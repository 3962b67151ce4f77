"""Causal Relation Network: an MLP on each pair of the present token and one up to it, summed over the pairs.

    r_t = sum over j <= t of exp(norm(a_t + c_j))        a_t = W_1 x_t + b        c_j = W_2 x_j
    y_t = W_3 norm(r_t) + b'        norm(z) = (z - mean z) / std z

The inner norm is of a pair, so that r_t is no function of a running sum, and every c_j has to be kept. Without it,
exp(a_t + c_j) is a product, r_t that of exp(a_t) and a running sum: a linear RNN, which the paper finds copies worse.

Source: Cui, Yan, Muhawenayo, Kerner, "An All-MLP Sequence Modeling Architecture That Excels at Copying" (2024),
arXiv:2406.16168, and its released code: the norms, both without weights, the biases, and normal initial values of 0.02.
Differs: the pool has the last `window` tokens, the present one included, so that the state is of one size: all of them,
as in the paper, up to that many. Variances have a floor. The sum around the layer and the norm before it are the
model's; nothing tells how long ago a token was, where the released model adds a learned position to each.

Dims: B batch, T time, D width, F hidden, W window, N blocks of Q tokens, P tokens before a block, R parts of a block,
      C queries of a part, L tokens in its reach, X any number of tokens.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from memzoo import contract, ops
from memzoo.ops.checks import check_impl

FLOOR = 1e-6  # of a variance
PART = 16  # queries at a time in the chunk form


class State(NamedTuple):
    c_BWF: jax.Array  # a ring of the last W tokens
    position_B: jax.Array  # at most 2 W


def step(state, a_F, c_F):
    """One token: its r, over its largest term. This is the definition; the chunk form is tested against it."""
    c_WF, p = state
    W = len(c_WF)
    c_WF = c_WF.at[p % W].set(c_F)
    seen_W1 = jnp.arange(W)[:, None] <= p
    z_WF = jnp.where(seen_W1, norm(a_F + c_WF), 0)  # no -inf: XLA's gradient of exp has been NaN there, in float64
    largest = jnp.max(z_WF, where=seen_W1, initial=-jnp.inf)
    return State(c_WF, bounded(p, W) + 1), jnp.sum(jnp.where(seen_W1, jnp.exp(z_WF - largest), 0), axis=0)


def norm(z_XF):
    centred_XF = z_XF - jnp.mean(z_XF, axis=-1, keepdims=True)
    return centred_XF * lax.rsqrt(jnp.mean(centred_XF**2, axis=-1, keepdims=True) + FLOOR)


def bounded(p, W):
    """p, or a smaller position with a full ring and the same place in it, so that no text is too long for int32."""
    return jnp.where(p < W, p, W + p % W)


class CausalRN(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Raises ValueError, by name, for fields out of their range, and for inputs, state or resets that do not fit.
    """

    width: int
    hidden: int | None = None  # width, as for copying; the released language model has 4 width
    window: int = 1024  # as `attention` has; the paper's texts are shorter
    impl: str = "auto"  # 'scan', 'chunk'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int]:
        """(F, W)"""
        F = self.hidden if self.hidden is not None else self.width
        contract.positive(width=self.width, hidden=F, window=self.window)
        if F < 2:
            raise ValueError(f"hidden: expected an integer >= 2, to have a variance, got {F}")
        return F, self.window

    def initial_state(self, batch: int) -> State:
        F, W = self.sizes()
        return State(jnp.zeros((batch, W, F), contract.state_dtype(self.dtype)), jnp.zeros(batch, jnp.int32))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        check_impl("causal_rn", self.impl, ("scan", "chunk"))
        fresh = state is None
        state = contract.begin(self, x_BTD, state, reset_BT)
        (F, _), (_, T, D) = self.sizes(), x_BTD.shape
        kinds: dict[str, Any] = {
            "kernel_init": nn.initializers.normal(0.02),
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }

        a_BTF, c_BTF = nn.Dense(F, name="a", **kinds)(x_BTD), nn.Dense(F, use_bias=False, name="c", **kinds)(x_BTD)
        wide = contract.state_dtype(self.dtype)
        xs = a_BTF.astype(wide), c_BTF.astype(wide)
        if self.impl == "scan" or (self.impl == "auto" and T == 1):
            r_BTF, state = ops.recur(step, state, xs, reset_BT)
        else:
            r_BTF, state = chunked(*xs, state, reset_BT, fresh)
        return nn.Dense(D, name="out", **kinds)(norm(r_BTF).astype(self.dtype)), state


def chunked(a_BTF, c_BTF, state, reset_BT, fresh):
    """All T tokens, in blocks that see themselves and the one before, a few queries at a time: (r_BTF, State).

    Time counts from the first token of this call: the ring lies at times < 0. A fresh one is left out.
    """
    (B, T, F), W = a_BTF.shape, state.c_BWF.shape[1]
    Q = min(T, W)
    N, C, R = -(-T // Q), min(PART, Q), -(-Q // min(PART, Q))
    P = 0 if fresh and N == 1 else W

    position_B = bounded(state.position_B, W)
    start_BT = jnp.broadcast_to(-position_B[:, None], (B, T))  # when each token's text began
    if reset_BT is not None:
        start_BT = lax.cummax(jnp.where(reset_BT, jnp.arange(T, dtype=jnp.int32), start_BT), axis=1)

    def pad(x_BTX, length, axis):
        return jnp.pad(x_BTX, [(0, length - size if i == axis else 0) for i, size in enumerate(x_BTX.shape)])

    def queries(x_BTX):  # [N, R, B, C, ...]
        x_BNQX = pad(x_BTX, N * Q, 1).reshape(B, N, Q, *x_BTX.shape[2:])
        x_BNRCX = pad(x_BNQX, R * C, 2).reshape(B, N, R, C, *x_BTX.shape[2:])
        return jnp.moveaxis(x_BNRCX, 0, 2)

    own_BNQF = pad(c_BTF, N * Q, 1).reshape(B, N, Q, F)
    past_BWF = take(state.c_BWF, (position_B[:, None] + jnp.arange(W)) % W)  # in the order of time
    earlier_BNPF = past_BWF[:, None, W - P :]
    if N > 1:
        earlier_BNPF = jnp.concatenate([earlier_BNPF, own_BNQF[:, :-1]], axis=1)
    seen_BNXF = pad(jnp.concatenate([earlier_BNPF, own_BNQF], axis=2), P + R * C, 2)
    L = min(W - 1 + C, P + R * C)

    def block(xs):
        first, a_RBCF, start_RBC, seen_BXF = xs

        @partial(jax.checkpoint, prevent_cse=False)  # the backward keeps no [C, L, F]
        def part(xs):
            i, a_BCF, start_BC = xs
            row = jnp.clip(P + (i + 1) * C - L, 0)
            c_BLF = lax.dynamic_slice_in_dim(seen_BXF, row, L, axis=1)
            return relate(a_BCF, c_BLF, start_BC, first + i * C + jnp.arange(C), first + row - P + jnp.arange(L), W)

        return lax.map(part, (jnp.arange(R), a_RBCF, start_RBC))

    xs = jnp.arange(N) * Q, queries(a_BTF), queries(start_BT), jnp.moveaxis(seen_BNXF, 1, 0)
    r_BNRCF = jnp.moveaxis(lax.map(block, xs), 2, 0)
    r_BTF = r_BNRCF.reshape(B, N, R * C, F)[:, :, :Q].reshape(B, N * Q, F)[:, :T]

    last_B1 = T - 1 - start_BT[:, -1:]
    j_BW = last_B1 - (last_B1 - jnp.arange(W)) % W  # the token that each slot is for
    time_BW = start_BT[:, -1:] + j_BW
    ring_BWF = jnp.where((time_BW >= 0)[..., None], take(c_BTF, jnp.maximum(time_BW, 0)), state.c_BWF)
    ring_BWF = jnp.where((j_BW >= 0)[..., None], ring_BWF, 0)
    return r_BTF, State(ring_BWF, bounded(last_B1[:, 0], W) + 1)


def relate(a_BCF, c_BLF, start_BC, t_C, j_L, W):
    """Queries at the times t, of texts that began then, and the tokens at the times j: r_BCF."""
    c_BLF = jnp.where((j_L >= start_BC[:, :1])[..., None], c_BLF, 0)  # cut, not only masked: it may be NaN
    t_C1 = t_C[:, None]
    seen_BCL = (j_L <= t_C1) & (j_L > t_C1 - W) & (j_L >= start_BC[..., None])
    seen_BCL = seen_BCL | (j_L == t_C1)  # also of what is padded, or its largest term is -inf
    z_BCLF = jnp.where(seen_BCL[..., None], norm(a_BCF[:, :, None] + c_BLF[:, None]), -jnp.inf)
    return jnp.sum(jnp.exp(z_BCLF - jnp.max(z_BCLF, axis=(2, 3), keepdims=True)), axis=2)


def take(c_BXF, row_BX):
    return jnp.take_along_axis(c_BXF, row_BX[..., None], axis=1)
