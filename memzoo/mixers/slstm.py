"""sLSTM: exponential gates with a normaliser and a running maximum, and units that meet within their head alone.

    i, f, z, o = W x_t + R h_{t-1} + b      each its own; W, R block-diagonal, a block per head; i, f see SiLU(conv(x))
    m_t = max(l_t + m_{t-1}, i)             l_t = log sigmoid(f), or f itself, where the forget gate is exp
    c_t = f' c_{t-1} + i' tanh(z)           f' = exp(l_t + m_{t-1} - m_t)
    n_t = f' n_{t-1} + i'                   i' = exp(i - m_t)
    h_t = sigmoid(o) c_t / n_t              y_t = GroupNorm(h_t), a group per head

Cell and normaliser stand for exp(m) c and exp(m) n, and m changes nothing: without it the gates would be sigmoid(f) and
exp(i).

Source: Beck, Pöppel, Spanring, Auer, Prudnikova, Kopp, Klambauer, Brandstetter, Hochreiter, "xLSTM: Extended Long
Short-Term Memory" (2024), arXiv:2405.04517, sec. 2.2, with the layer around it of its appendix (the post up-projection
block up to its MLP) and the initial values of its released code.
Differs: a unit is fresh while its n is 0, and then m_t = i, where the code asks this of all units at once; from its
first token on n >= 1, and |c| <= n. `newton` iterates on h, c / n and the log of exp(m) n, which take no maximum:
with recurrent weights of deviation 1 it settles 1,024 tokens in 26 iterations, and with h, c, n and m it took 941 (4
heads of 4 units; 9 and 13 as initialised).

Dims: B batch, T time, D width, H heads, K units of a head, D = H K, W window, P = W - 1 past inputs, G gates in the
order i, f, z, o, E = G K, X = 3 H K: h, c / n and log n, head by head. Recurrent kernels [H, K, E] go from units to
gates.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from memzoo import contract, ops
from memzoo.ops.initial import within

LOG_FORGET = {"sigmoid": nn.log_sigmoid, "exp": lambda f: f}
NOTHING = -1e30  # the log of a normaliser that is 0, but a number


class State(NamedTuple):
    past_BPD: jax.Array
    h_BHK: jax.Array
    c_BHK: jax.Array
    n_BHK: jax.Array
    m_BHK: jax.Array


def step(state, a_E, R_KE, forget_gate="sigmoid"):
    """One token, one head; a = W x + b. This is the definition; every faster form is tested against it."""
    h_K, c_K, n_K, m_K = state
    i_K, f_K, z_K, o_K = jnp.split(a_E + h_K @ R_KE, 4)
    kept_K = LOG_FORGET[forget_gate](f_K) + jnp.where(n_K == 0, -jnp.inf, m_K)  # nothing, where nothing was written
    m_K = jnp.maximum(kept_K, i_K)
    forget_K, write_K = jnp.exp(kept_K - m_K), jnp.exp(i_K - m_K)
    c_K = forget_K * c_K + write_K * jnp.tanh(z_K)
    n_K = forget_K * n_K + write_K
    return nn.sigmoid(o_K) * c_K / n_K, c_K, n_K, m_K


class SLSTM(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Raises ValueError, by name, for a width that heads do not divide, an unknown forget gate, a depth outside of 0 to 1,
    and for inputs, state or resets that do not fit.
    """

    width: int
    heads: int = 4
    conv_width: int = 4  # W, of what the input and forget gates see; 0 is no convolution
    forget_gate: str = "sigmoid"  # or "exp", which may grow what is there
    depth: float = 0.0  # the layer's place in a stack, from 0 to 1: higher ones begin with more units that remember
    impl: str = "auto"  # 'scan', 'newton'
    jacobian: str = "auto"  # see ops.newton_scan: how 'newton' iterates, not what it finds
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int, int]:
        """(H, K, P)"""
        K = contract.divisible("width", self.width, "heads", self.heads)
        ops.check_jacobian(self.jacobian)
        if not contract.whole_number(self.conv_width) or self.conv_width < 0:
            raise ValueError(f"conv_width: expected an integer >= 0, got {self.conv_width!r}")
        if self.forget_gate not in LOG_FORGET:
            near = contract.nearest(str(self.forget_gate), LOG_FORGET)
            raise ValueError(f"forget_gate: unknown gate {self.forget_gate!r}; {near}")
        if not 0 <= self.depth <= 1:
            raise ValueError(f"depth: expected a number from 0 to 1, got {self.depth}")
        return self.heads, K, max(0, self.conv_width - 1)

    def initial_state(self, batch: int) -> State:
        (H, K, P), wide = self.sizes(), contract.state_dtype(self.dtype)
        return State(jnp.zeros((batch, P, self.width), wide), *(jnp.zeros((batch, H, K), wide) for _ in range(4)))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        past_BPD, *cell = contract.begin(self, x_BTD, state, reset_BT)
        (H, K, P), D, wide = self.sizes(), self.width, contract.state_dtype(self.dtype)
        x_BTD = x_BTD.astype(self.dtype)

        seen_BTD = x_BTD
        if self.conv_width:
            start = within(self.conv_width**-0.5)
            f_WD = self.param("conv", start, (P + 1, D), self.param_dtype)
            bias_D = self.param("conv_bias", start, (D,), self.param_dtype)
            seen_BTD, past_BPD = ops.short_conv(x_BTD, f_WD, past_BPD, reset_BT)
            seen_BTD = nn.silu(seen_BTD + bias_D.astype(self.dtype))
        by_gate = jnp.stack([seen_BTD, seen_BTD, x_BTD, x_BTD]).reshape(4, *x_BTD.shape[:2], H, K)
        W_GHKK = self.param("in", nn.initializers.normal((2 / 5 / D) ** 0.5), (4, H, K, K), self.param_dtype)
        b_GHK = self.param("bias", partial(power_law, self.depth), (4, H, K), self.param_dtype)
        a_BTHGK = jnp.einsum("gbthj,ghjk->bthgk", by_gate, W_GHKK.astype(self.dtype), preferred_element_type=wide)
        a_BTHE = (a_BTHGK + jnp.swapaxes(b_GHK, 0, 1).astype(wide)).reshape(*x_BTD.shape[:2], H, 4 * K)
        R_HKE = self.param("recurrent", nn.initializers.zeros, (H, K, 4 * K), self.param_dtype).astype(wide)

        h_BTHK, cell = scalar_lstm(a_BTHE, R_HKE, cell, reset_BT, self.forget_gate, self.impl, self.jacobian)
        per_head: dict[str, Any] = {"feature_axes": (-2, -1), "use_bias": False, "use_fast_variance": False}
        norm = nn.LayerNorm(1e-5, dtype=self.dtype, param_dtype=self.param_dtype, name="norm", **per_head)
        return norm(h_BTHK).reshape(x_BTD.shape), State(past_BPD, *cell)


def scalar_lstm(a_BTHE, R_HKE, cell, reset_BT=None, forget_gate="sigmoid", impl="auto", jacobian="auto"):
    """All T tokens, from the cell (h_BHK, c_BHK, n_BHK, m_BHK). Returns (h_BTHK, cell)."""
    if impl == "scan" or (impl == "auto" and jax.default_backend() == "cpu"):

        def token(cell, a_HE):
            cell = jax.vmap(partial(step, forget_gate=forget_gate))(cell, a_HE, R_HKE)
            return cell, cell[0]

        return ops.recur(token, tuple(cell), (a_BTHE,), reset_BT)

    (B, T, H, _), K, X = a_BTHE.shape, R_HKE.shape[1], 3 * R_HKE.shape[0] * R_HKE.shape[1]
    if reset_BT is None:
        reset_BT = jnp.zeros((B, T), bool)
    h_BHK, c_BHK, n_BHK, m_BHK = (jnp.where(reset_BT[:, 0, None, None], 0, s_BHK) for s_BHK in cell)
    written_BHK = jnp.where(n_BHK == 0, 1, n_BHK)
    log_n_BHK = jnp.where(n_BHK == 0, NOTHING, jnp.log(written_BHK) + m_BHK)

    def token(s_X, a_fresh):
        a_HE, fresh = a_fresh
        h_HK, r_HK, log_n_HK = jnp.moveaxis(s_X.reshape(H, 3, K), 1, 0)
        log_n_HK = jnp.where(fresh, NOTHING, log_n_HK)
        heads = jax.vmap(partial(smooth_step, forget_gate=forget_gate))
        return jnp.stack(heads(h_HK, r_HK, log_n_HK, a_HE, R_HKE), axis=1).ravel()

    s_BX = jnp.stack([h_BHK, c_BHK / written_BHK, log_n_BHK], axis=2).reshape(B, X)
    how: dict[str, Any] = {"impl": impl, "jacobian": jacobian, "blocks": H}
    s_BTX, _ = ops.nonlinear_scan(token, s_BX, (a_BTHE, reset_BT), reset_BT, **how)
    h_BTHK, r_BTHK, log_n_BTHK = jnp.moveaxis(s_BTX.reshape(B, T, H, 3, K), 3, 0)

    # Given every h, m is a running maximum, and c and n follow.
    before_BTHK = jnp.concatenate([h_BHK[:, None], h_BTHK[:, :-1]], axis=1)
    before_BTHK = jnp.where(reset_BT[..., None, None], 0, before_BTHK)
    gates_BTHE = a_BTHE + jnp.einsum("bthk,hke->bthe", before_BTHK, R_HKE, precision="highest")
    i_BTHK, f_BTHK = gates_BTHE[..., :K], gates_BTHE[..., K : 2 * K]
    rows = lambda x: x.reshape(*x.shape[:-2], H * K)
    m_BX = jnp.where(n_BHK == 0, -jnp.inf, m_BHK)
    _, m_BTX = ops.max_scan(rows(LOG_FORGET[forget_gate](f_BTHK)), rows(i_BTHK), rows(m_BX), reset_BT)
    m_BHK = m_BTX[:, -1].reshape(B, H, K)
    n_BHK = jnp.exp(log_n_BTHK[:, -1] - m_BHK)
    return h_BTHK, (h_BTHK[:, -1], r_BTHK[:, -1] * n_BHK, n_BHK, m_BHK)


def smooth_step(h_K, r_K, log_n_K, a_E, R_KE, forget_gate="sigmoid"):
    """The same as `step`, of r = c / n and the log of exp(m) n, without a maximum: it is smooth, as Newton wants it."""
    i_K, f_K, z_K, o_K = jnp.split(a_E + h_K @ R_KE, 4)
    kept_K = LOG_FORGET[forget_gate](f_K) + log_n_K
    r_K = r_K + nn.sigmoid(i_K - kept_K) * (jnp.tanh(z_K) - r_K)
    return nn.sigmoid(o_K) * r_K, r_K, jnp.logaddexp(kept_K, i_K)


def power_law(depth, key, shape, dtype=float):
    """Biases 0 but for the forget gates', which fall from 5 to -7 over the units of each head, late in high layers."""
    K = shape[-1]
    forget_K = 5 - 12 * (np.arange(K) / max(1, K - 1)) ** (0.3 + 1.3 * depth)
    return jnp.zeros(shape, dtype).at[1].set(jnp.asarray(forget_K, dtype))
