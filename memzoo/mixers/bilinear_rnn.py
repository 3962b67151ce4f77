"""Bilinear RNN: the token chooses a linear map of the state, and nothing is ever added to it.

    h_t = A_t h_{t-1}        (A_t)_ij = sum_k W_ijk x_k        y_t = W_out sqrt(K) h_t / |h_t|

    kind         A                                                      what it can track
    "full"       any W                                                  any finite-state machine
    "cp"         U diag(W x) V', W of CP rank R                         as R grows, any
    "block"      block-diagonal                                         a machine with as many states as a block has
    "rotation"   2 x 2 blocks [[a, -b], [b, a]] over sqrt(a^2 + b^2)    sums modulo m: they commute
    "diagonal"   real, of either sign                                   parity

Source: Ebrahimi, Memisevic, "Revisiting Bi-Linear State Transitions in Recurrent Neural Networks" (2025),
arXiv:2505.21749: the recurrence without additive terms and the hierarchy of its kinds.
Differs: the initialisation and the parameters of a rotation, two numbers over their length, are ours. h is divided by
its length at every token, and read at length sqrt(K). The paper divides at inference alone, which changes no direction,
as nothing is added; here training computes the same function as inference, and no product overflows. Each block, of K
entries, has its own length, or the block that grows fastest would be all that is left after a hundred tokens; only the
diagonal kind, of whose blocks nothing but signs would remain, has one length, and that fate. A sequence begins with the
first unit vector of each block (diagonal: with equal entries): for a W that may be anything, all starts are a change of
basis apart.

Dims: B batch, T time, D width, F hidden, N blocks, K block size, F = N K, R rank.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from memzoo import contract, ops

KINDS = ("full", "cp", "block", "rotation", "diagonal")


class State(NamedTuple):
    h_BNK: jax.Array


def step(h_NK, x_D, begins, transition, start_NK):
    """One token, as it stands. This is the definition; every faster form is tested against it."""
    h_NK = jnp.where(begins, start_NK, h_NK)
    A = transition(x_D)
    h_NK = A * h_NK if A.ndim == 2 else jnp.einsum("nij,nj->ni", A, h_NK)
    h_NK = ops.direction(h_NK, axes=(-1,))
    return h_NK, h_NK


class BilinearRNN(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Raises ValueError, by name, for an unknown kind, for blocks that do not fill the state, for a block size or rank
    that the kind does not have, and for inputs, state or resets that do not fit.
    """

    width: int
    kind: str = "block"  # the paper's first is "full", whose W has F^2 D entries, and A F^2 per token
    hidden: int | None = None  # F; width
    block_size: int | None = None  # K of kind "block"; 8, or the largest divisor of 8 that also divides hidden
    rank: int | None = None  # R of kind "cp"; hidden
    impl: str = "auto"  # 'scan', 'associative', 'chunk'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int, int]:
        """(N, K, R), blocks of one length each"""
        F = self.width if self.hidden is None else self.hidden
        contract.positive(width=self.width, hidden=F)
        if self.kind not in KINDS:
            raise ValueError(f"kind: unknown kind {self.kind!r}; {contract.nearest(str(self.kind), KINDS)}")
        for name, value, kind in (("block_size", self.block_size, "block"), ("rank", self.rank, "cp")):
            if value is not None and self.kind != kind:
                raise ValueError(f"{name}: expected None for kind {self.kind!r}, got {value}")
        block = math.gcd(8, F) if self.block_size is None else self.block_size
        K = {"block": block, "rotation": 2}.get(self.kind, F)
        R = F if self.rank is None else self.rank
        contract.positive(rank=R)
        return contract.divisible("hidden", F, "block_size", K), K, R

    def start(self) -> jax.Array:
        """start_NK"""
        N, K, _ = self.sizes()
        wide = contract.state_dtype(self.dtype)
        return jnp.full((N, K), K**-0.5, wide) if self.kind == "diagonal" else jnp.eye(1, K, dtype=wide).repeat(N, 0)

    def initial_state(self, batch: int) -> State:
        return State(jnp.repeat(self.start()[None], batch, axis=0))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        (N, K, R), D, wide = self.sizes(), self.width, contract.state_dtype(self.dtype)

        def param(name, *shape, variance):
            return self.param(name, nn.initializers.normal(variance**-0.5), shape, self.param_dtype).astype(wide)

        # |A h| is |h| on average at the start, for x of unit variance.
        weights: tuple[jax.Array, ...]
        if self.kind == "cp":
            weights = param("W", D, R, variance=D), param("U", K, R, variance=R), param("V", K, R, variance=K)
        elif self.kind == "rotation":
            weights = (param("W", D, N, 2, variance=D),)
        elif self.kind == "diagonal":
            weights = (param("W", D, N, K, variance=D),)
        else:
            weights = (param("W", D, N, K, K, variance=D * K),)

        h_BTNK, h_BNK = bilinear(x_BTD, self.kind, weights, state.h_BNK, self.start(), reset_BT, self.impl)
        h_BTF = (h_BTNK * K**0.5).reshape(*x_BTD.shape[:2], N * K)
        y_BTD = nn.Dense(D, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype, name="out")(h_BTF)
        return y_BTD, State(h_BNK)


def bilinear(x_BTD, kind, weights, h_BNK, start_NK, reset_BT, impl="auto"):
    """All T tokens. Returns (h_BTNK, h_BNK)."""
    x_BTD = x_BTD.astype(start_NK.dtype)
    if impl == "scan":
        begins_BT = jnp.zeros(x_BTD.shape[:2], bool) if reset_BT is None else reset_BT
        one = partial(step, transition=lambda x_D: transitions(x_D, kind, weights), start_NK=start_NK)
        return ops.recur(one, h_BNK, (x_BTD, begins_BT))
    return ops.direction_scan(transitions(x_BTD, kind, weights), start_NK, h_BNK, reset_BT, impl=impl)


def transitions(x, kind, weights):
    """A of each token: the leading axes of x, then [N, K, K], or the diagonals [N, K]."""
    dot = partial(jnp.einsum, precision="highest")
    if kind == "cp":
        W_DR, U_KR, V_KR = weights
        return dot("...d,dr,ir,jr->...ij", x, W_DR, U_KR, V_KR)[..., None, :, :]
    if kind == "rotation":
        a, b = jnp.moveaxis(ops.direction(dot("...d,dnk->...nk", x, weights[0]), axes=(-1,)), -1, 0)
        return jnp.stack([jnp.stack([a, -b], -1), jnp.stack([b, a], -1)], -2)
    return jnp.tensordot(x, weights[0], axes=1, precision="highest")
