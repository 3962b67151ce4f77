"""LongMamba: a trained Mamba whose channels of long memory skip tokens of small step, to last a longer context.

    dt_t <- dt_t if dt_t > threshold else 0        per channel; at 0 a token neither writes nor makes forget
    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = C_t h_t + D x_t

A channel is global if it still remembers after the training length, max_n exp(A_n sum_t dt_t) > min_decay; only then
its threshold is not 0. It is set such that over `context` tokens the steps that are left add up to what all of them
added up to over the training length.

The parameters are Mamba's. Thresholds are a collection of their own, and a call on sequences of the training length
that may write it calibrates every layer of a model; without `context` the layer is Mamba:

    _, calibration = model.apply({"params": trained}, tokens, mutable=["calibration"])
    logits, state = model.apply({"params": trained} | calibration, long_tokens)

Each such call, also one with mutable=True, calibrates anew, whatever thresholds it was given, and skips nothing itself.

Source: Ye, Xia, Fu, Dong, Hong, Yuan, Diao, Kautz, Molchanov, Lin, "LongMamba: Enhancing Mamba's Long Context
Capabilities via Training-Free Receptive Field Enlargement" (2025), arXiv:2504.16053, and its released code (dt_thre);
the rest is Mamba, arXiv:2312.00752.
Differs: the code has Mamba-2's one decay per channel, here the slowest of N states decides; it averages thresholds over
calibration sequences, here their tokens are pooled; before that it clamps each channel's steps at the least of its top
10, 15 or 20 per cent, here they stay as they are; it skips in the prompt alone and by the prompt's length, here the
context is a field and all tokens are alike, so that a stream is what it is in one call. min_decay is its default.

Dims: B batch, T time, D width, E = expand D channels, N state size, R rank of dt, W conv width, P = W - 1 past inputs,
      S = B T tokens.
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


def step(h_NE, x_E, dt_E, A_NE, B_N, C_N, D_E, threshold_E):
    """One token. This is the definition; every faster form is tested against it."""
    dt_E = skip(dt_E, threshold_E)
    h_NE = jnp.exp(dt_E * A_NE) * h_NE + jnp.outer(B_N, dt_E * x_E)
    return h_NE, C_N @ h_NE + D_E * x_E


def skip(dt_E, threshold_E):
    return jnp.where(dt_E > threshold_E, dt_E, 0)


def calibrate(dt_BTE, A_NE, context, min_decay=0.05):
    """Thresholds [E] for `context` tokens from the steps of sequences of the training length T; zeros if it is <= T."""
    T = dt_BTE.shape[1]
    dt_SE = -jnp.sort(-dt_BTE.reshape(-1, dt_BTE.shape[-1]), axis=0)  # the largest first
    total_SE = jnp.cumsum(dt_SE, axis=0)
    budget_E = total_SE[-1] * (T / context)
    cut_E = jnp.argmax(total_SE > budget_E, axis=0)  # the first that is too much
    around_2E = jnp.stack([jnp.maximum(cut_E - 1, 0), cut_E])  # the threshold is between tokens, and on none of them
    threshold_E = jnp.mean(jnp.take_along_axis(dt_SE, around_2E, axis=0), axis=0)
    decay_E = jnp.exp(jnp.max(A_NE, axis=0) * jnp.mean(jnp.sum(dt_BTE, axis=1), axis=0))
    return jnp.where((decay_E > min_decay) & (context > T), threshold_E, 0)


class LongMamba(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Raises ValueError, by name, for a context that was not calibrated, and for sizes, inputs, state or resets that do
    not fit.
    """

    width: int
    expand: int = 2
    state_size: int = 16  # N, per channel
    dt_rank: int | None = None  # R; width / 16, rounded up
    conv_width: int = 4
    context: int | None = None  # the length to last for; None skips nothing
    min_decay: float = 0.05  # what a channel keeps over the training length if it is global
    impl: str = "auto"  # 'scan', 'associative', 'chunk'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int, int, int]:
        """(E, N, R, P)"""
        R = -(-self.width // 16) if self.dt_rank is None else self.dt_rank
        contract.positive(width=self.width, expand=self.expand, dt_rank=R)
        contract.positive(state_size=self.state_size, conv_width=self.conv_width)
        if self.context is not None:
            contract.positive(context=self.context)
        if not 0 <= self.min_decay <= 1:
            raise ValueError(f"min_decay: expected a number in [0, 1], got {self.min_decay}")
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
        wide, conv = contract.state_dtype(self.dtype), within((P + 1) ** -0.5)
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        gates: dict[str, Any] = {"dtype": wide, "param_dtype": self.param_dtype}
        plain: dict[str, Any] = {"use_bias": False, "kernel_init": like_torch}

        def param(name, init, *shape):
            return self.param(name, init, shape, self.param_dtype)

        x_BTE, z_BTE = jnp.split(nn.Dense(2 * E, name="in", **plain, **kinds)(x_BTD), 2, axis=-1)
        f_WE, bias_E = param("conv", conv, P + 1, E), param("conv_bias", conv, E)
        x_BTE, past_BPE = ops.short_conv(x_BTE, f_WE, state.past_BPE, reset_BT)
        x_BTE = nn.silu(x_BTE + bias_E.astype(self.dtype))

        dt_BTR = nn.Dense(R, name="dt_low", **plain, **gates)(x_BTE)
        dt = nn.Dense(E, name="dt", kernel_init=within(R**-0.5), bias_init=small_step, **gates)
        dt_BTE = nn.softplus(dt(dt_BTR))
        A_NE = -jnp.exp(param("A_log", log_integers, N, E).astype(wide))
        B_EN, C_EN = (param(name, like_torch, E, N) for name in ("B", "C"))
        dot = partial(jnp.einsum, "bte,en->btn", preferred_element_type=wide)
        B_BTN, C_BTN = dot(x_BTE, B_EN.astype(self.dtype)), dot(x_BTE, C_EN.astype(self.dtype))
        D_E = param("D", nn.initializers.ones, E).astype(wide)

        threshold_E = self.thresholds(dt_BTE, A_NE)
        xs = x_BTE, dt_BTE, A_NE, B_BTN, C_BTN, D_E, threshold_E
        y_BTE, h_BNE = skipping_s6(*xs, state.h_BNE, reset_BT, self.impl)
        y_BTD = nn.Dense(D, name="out", **plain, **kinds)(y_BTE * nn.silu(z_BTE))
        return y_BTD, State(h_BNE, past_BPE)

    def thresholds(self, dt_BTE, A_NE):
        """Those of the collection for this context; zeros without one, and in the call that calibrates."""
        none_E = jnp.zeros(dt_BTE.shape[-1], dt_BTE.dtype)
        if self.context is None or self.is_initializing():
            return none_E
        name = f"threshold_{self.context}"
        if self.is_mutable_collection("calibration"):
            self.put_variable("calibration", name, calibrate(dt_BTE, A_NE, self.context, self.min_decay))
            return none_E
        if not self.has_variable("calibration", name):
            raise ValueError(
                f"calibration: expected {name!r}, as context = {self.context}; see memzoo.mixers.long_mamba"
            )
        return self.get_variable("calibration", name)


def skipping_s6(x_BTE, dt_BTE, A_NE, B_BTN, C_BTN, D_E, threshold_E, h_BNE, reset_BT, impl="auto"):
    """All T tokens. Returns (y_BTE, h_BNE)."""
    if impl == "scan":

        def token(h_NE, x_E, dt_E, B_N, C_N):
            return step(h_NE, x_E, dt_E, A_NE, B_N, C_N, D_E, threshold_E)

        y_BTE, h_BNE = ops.recur(token, h_BNE, ops.widen((x_BTE, dt_BTE, B_BTN, C_BTN)), reset_BT)
        return y_BTE.astype(x_BTE.dtype), h_BNE
    dt_BTE = skip(dt_BTE, threshold_E)
    y_BTE, h_BNE = ops.selective_scan(x_BTE, dt_BTE, A_NE, B_BTN, C_BTN, h_BNE, reset_BT, impl=impl)
    return (y_BTE + D_E * x_BTE).astype(x_BTE.dtype), h_BNE


def log_integers(key, shape, dtype=float):
    """log A = log(1 .. N) in each channel: the real part of S4D's eigenvalues."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[0] + 1, dtype=dtype))[:, None], shape)
