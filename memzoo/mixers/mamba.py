"""Mamba (S6): a state-space model that selects, since its step size, input and output depend on the token.

    dt_t, B_t, C_t = softplus(W x_t + b), W_B x_t, W_C x_t
    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = C_t h_t + D x_t        per channel, N states each

Source: Gu, Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), arXiv:2312.00752, sec. 3.2,
algorithm 2, and sec. 3.4; block, sizes and initialisation from the released code (mamba_ssm).
initialisation="mimetic": Trockman, Harutyunyan, Kolter, Kumar, Bhojanapalli, "Mimetic Initialization Helps State Space
Models Learn to Recall" (2024), arXiv:2410.11135: the layer starts as causal linear attention, y_t = sum_{s<=t} (C_t .
B_s) x_s, which looks for tokens like the present one. A is near 0, so that nothing is forgotten; dt = 1 for all tokens;
W_C is correlated with W_B, not equal to it; the convolution is the identity.
Differs: h and A are [N, E], the paper's transpose; the projections of dt, B and C are separate, and dt is float32. The
released model divides the initial weights of `out` by the square root of how many layers it has; a mixer does not know.
Of mimetic's numbers A = -exp(-8) and W_C = (W_B + a random matrix) / 2 are chosen here.

Dims: B batch, T time, D width, E = expand D channels, N state size, R rank of dt, W conv width, P = W - 1 past inputs.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from memzoo import contract, ops
from memzoo.ops.initial import like_torch, small_step, within


class State(NamedTuple):
    h_BNE: jax.Array
    past_BPE: jax.Array


def step(h_NE, x_E, dt_E, A_NE, B_N, C_N, D_E):
    """One token. This is the definition; every faster form is tested against it."""
    h_NE = jnp.exp(dt_E * A_NE) * h_NE + jnp.outer(B_N, dt_E * x_E)
    return h_NE, C_N @ h_NE + D_E * x_E


class Mamba(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Raises ValueError, by name, for an unknown initialisation, and for sizes, inputs, state or resets that do not fit.
    """

    width: int
    expand: int = 2
    state_size: int = 16  # N, per channel
    dt_rank: int | None = None  # R; width / 16, rounded up
    conv_width: int = 4
    initialisation: str = "default"  # or 'mimetic'
    impl: str = "auto"  # 'scan', 'associative', 'chunk'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int, int, int]:
        """(E, N, R, P)"""
        R = -(-self.width // 16) if self.dt_rank is None else self.dt_rank
        contract.positive(width=self.width, expand=self.expand, dt_rank=R)
        contract.positive(state_size=self.state_size, conv_width=self.conv_width)
        if self.initialisation not in ("default", "mimetic"):
            raise ValueError(f"initialisation: expected 'default' or 'mimetic', got {self.initialisation!r}")
        return self.expand * self.width, self.state_size, R, self.conv_width - 1

    def initial_state(self, batch: int) -> State:
        E, N, _, P = self.sizes()
        wide = contract.state_dtype(self.dtype)
        return State(jnp.zeros((batch, N, E), wide), jnp.zeros((batch, P, E), wide))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        (E, N, R, P), D = self.sizes(), self.width
        wide, start = contract.state_dtype(self.dtype), initialisers(self.initialisation, P + 1, R)
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        gates: dict[str, Any] = {"dtype": wide, "param_dtype": self.param_dtype}
        plain: dict[str, Any] = {"use_bias": False, "kernel_init": like_torch}

        def param(name, init, *shape):
            return self.param(name, init, shape, self.param_dtype)

        x_BTE, z_BTE = jnp.split(nn.Dense(2 * E, name="in", **plain, **kinds)(x_BTD), 2, axis=-1)
        f_WE, bias_E = param("conv", start["conv"], P + 1, E), param("conv_bias", start["conv_bias"], E)
        x_BTE, past_BPE = ops.short_conv(x_BTE, f_WE, state.past_BPE, reset_BT)
        x_BTE = nn.silu(x_BTE + bias_E.astype(self.dtype))

        dt_BTR = nn.Dense(R, name="dt_low", **plain, **gates)(x_BTE)
        dt_BTE = nn.softplus(
            nn.Dense(E, name="dt", kernel_init=start["dt"], bias_init=start["dt_bias"], **gates)(dt_BTR)
        )
        A_NE = -jnp.exp(param("A_log", start["A_log"], N, E).astype(wide))
        B_EN = param("B", like_torch, E, N)
        C_EN = param("C", partial(start["C"], B_EN), E, N)
        dot = partial(jnp.einsum, "bte,en->btn", preferred_element_type=wide)
        B_BTN, C_BTN = dot(x_BTE, B_EN.astype(self.dtype)), dot(x_BTE, C_EN.astype(self.dtype))
        D_E = param("D", nn.initializers.ones, E).astype(wide)

        y_BTE, h_BNE = s6(x_BTE, dt_BTE, A_NE, B_BTN, C_BTN, D_E, state.h_BNE, reset_BT, self.impl)
        y_BTD = nn.Dense(D, name="out", **plain, **kinds)(y_BTE * nn.silu(z_BTE))
        return y_BTD, State(h_BNE, past_BPE)


def s6(x_BTE, dt_BTE, A_NE, B_BTN, C_BTN, D_E, h_BNE, reset_BT, impl="auto"):
    """All T tokens. Returns (y_BTE, h_BNE)."""
    if impl == "scan":

        def token(h_NE, x_E, dt_E, B_N, C_N):
            return step(h_NE, x_E, dt_E, A_NE, B_N, C_N, D_E)

        y_BTE, h_BNE = ops.recur(token, h_BNE, ops.widen((x_BTE, dt_BTE, B_BTN, C_BTN)), reset_BT)
        return y_BTE.astype(x_BTE.dtype), h_BNE
    y_BTE, h_BNE = ops.selective_scan(x_BTE, dt_BTE, A_NE, B_BTN, C_BTN, h_BNE, reset_BT, impl=impl)
    return (y_BTE + D_E * x_BTE).astype(x_BTE.dtype), h_BNE


def initialisers(kind, W, R):
    """Of the parameters in which the two kinds differ."""
    if kind == "mimetic":
        zeros, one = nn.initializers.zeros, nn.initializers.constant(0.5413248546)  # softplus of it is 1
        A_log = nn.initializers.constant(-8.0)
        return {"conv": last_tap, "conv_bias": zeros, "dt": zeros, "dt_bias": one, "A_log": A_log, "C": beside}
    conv, dt = within(W**-0.5), within(R**-0.5)
    return {"conv": conv, "conv_bias": conv, "dt": dt, "dt_bias": small_step, "A_log": log_integers, "C": apart}


def log_integers(key, shape, dtype=float):
    """log A = log(1 .. N) in each channel: the real part of S4D's eigenvalues."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[0] + 1, dtype=dtype))[:, None], shape)


def last_tap(key, shape, dtype=float):
    return jnp.zeros(shape, dtype).at[-1].set(1)


def apart(B_EN, key, shape, dtype=float):
    return like_torch(key, shape, dtype)


def beside(B_EN, key, shape, dtype=float):
    """Half of it is W_B, so that C_t . B_s is large where the tokens t and s are alike."""
    return (B_EN + apart(B_EN, key, shape, dtype)) / 2
