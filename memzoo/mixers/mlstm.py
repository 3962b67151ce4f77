"""mLSTM: a matrix memory with an exponential input gate, and a running maximum that keeps its exponents in range.

    m_t = max(log f_t + m_{t-1}, i_t, 0)        C_t = f' C_{t-1} + i' k_t v_t'        f' = exp(log f_t + m_{t-1} - m_t)
    y_t = C_t' q_t / max(|n_t' q_t|, exp(-m_t))        n_t = f' n_{t-1} + i' k_t        i' = exp(i_t - m_t)

Memory and normaliser stand for exp(m) C and exp(m) n, and m changes nothing: without it the gates would be f and
exp(i), and the floor of the denominator 1.

Source: Beck, Pöppel, Spanring, Auer, Prudnikova, Kopp, Klambauer, Brandstetter, Hochreiter, "xLSTM: Extended Long
Short-Term Memory" (2024), arXiv:2405.04517, sec. 2.3; the layer of Beck et al., "xLSTM 7B: A Recurrent LLM for Fast
and Efficient Inference" (2025), arXiv:2503.13427, with the soft caps, norm and initial gates of its released code.
Differs: C is [K, V], the paper's transpose; m never falls below 0, so that exp(-m) cannot overflow, and starts there;
the released code adds 1e-6 to the denominator, after which m would matter.

Dims: B batch, T time, D width, H heads, K key, V value.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from memzoo import contract, ops

FORGET = ("sigmoid", "exp")


class State(NamedTuple):
    C_BHKV: jax.Array
    n_BHK: jax.Array
    m_BH: jax.Array


def step(state, q_K, k_K, v_V, i, log_f):
    """One token, one head; i is the log of the input gate. This is the definition; every form is tested against it."""
    C_KV, n_K, m_before = state
    m = jnp.maximum(jnp.maximum(log_f + m_before, i), 0)
    forget, write = jnp.exp(log_f + m_before - m), jnp.exp(i - m)
    C_KV = forget * C_KV + write * jnp.outer(k_K, v_V)
    n_K = forget * n_K + write * k_K
    return State(C_KV, n_K, m), q_K @ C_KV / jnp.maximum(jnp.abs(q_K @ n_K), jnp.exp(-m))


class MLSTM(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Raises ValueError, by name, for a width that heads do not divide, an unknown forget gate, a cap that is not
    positive, biases that are not two, and for inputs, state or resets that do not fit.
    """

    width: int
    heads: int = 4
    key_dim: int | None = None  # per head; half of value_dim
    value_dim: int | None = None  # per head; width / heads
    forget_gate: str = "sigmoid"  # or "exp", which may grow what is there
    gate_cap: float = 15.0  # what makes the gates is capped softly, as cap tanh(x / cap); a very large one is none
    input_bias: float = -10.0  # of the input gate at the start: little is written
    forget_bias: tuple[float, float] = (3.0, 6.0)  # of the first head and the last: from 20 to 400 tokens are held
    impl: str = "auto"  # 'scan', 'associative', 'chunk'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int, int]:
        """(H, K, V)"""
        per_head = contract.divisible("width", self.width, "heads", self.heads)
        V = self.value_dim if self.value_dim is not None else per_head
        contract.positive(value_dim=V)
        K = self.key_dim if self.key_dim is not None else max(1, V // 2)
        contract.positive(key_dim=K)
        if self.forget_gate not in FORGET:
            near = contract.nearest(str(self.forget_gate), FORGET)
            raise ValueError(f"forget_gate: unknown gate {self.forget_gate!r}; {near}")
        if not self.gate_cap > 0:
            raise ValueError(f"gate_cap: expected a number > 0, got {self.gate_cap}")
        if np.shape(self.forget_bias) != (2,) or not np.isfinite(self.forget_bias).all():
            raise ValueError(f"forget_bias: expected two finite numbers, got {self.forget_bias!r}")
        return self.heads, K, V

    def initial_state(self, batch: int) -> State:
        (H, K, V), wide = self.sizes(), contract.state_dtype(self.dtype)
        return State(*(jnp.zeros((batch, *axes), wide) for axes in ((H, K, V), (H, K), (H,))))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        (H, K, V), D = self.sizes(), self.width
        kinds: dict[str, Any] = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}

        q_BTHK = nn.DenseGeneral((H, K), name="q", **kinds)(x_BTD)
        k_BTHK = nn.DenseGeneral((H, K), name="k", **kinds)(x_BTD) * K**-0.5
        v_BTHV = nn.DenseGeneral((H, V), name="v", **kinds)(x_BTD)
        i_BTH = self.log_gate("input", nn.initializers.constant(self.input_bias))(x_BTD)
        f_BTH = self.log_gate("forget", spread(*self.forget_bias, self.forget_gate))(x_BTD)
        i_BTH, f_BTH = (self.gate_cap * jnp.tanh(gate_BTH / self.gate_cap) for gate_BTH in (i_BTH, f_BTH))
        log_f_BTH = nn.log_sigmoid(f_BTH) if self.forget_gate == "sigmoid" else f_BTH

        y_BTHV, state = matrix_lstm(q_BTHK, k_BTHK, v_BTHV, i_BTH, log_f_BTH, state, reset_BT, self.impl)

        per_head: dict[str, Any] = {"feature_axes": (-2, -1), "use_fast_variance": False, **kinds}
        y_BTHV = nn.LayerNorm(name="norm", **per_head)(y_BTHV)
        o_BTHV = nn.sigmoid(nn.DenseGeneral((H, V), name="gate", **kinds)(x_BTD))
        return nn.DenseGeneral(D, axis=(-2, -1), name="out", **kinds)(o_BTHV * y_BTHV), state

    def log_gate(self, name, bias_init):
        """The log of a gate, or what makes it, for each head; at the start the same for all tokens."""
        wide = contract.state_dtype(self.dtype)
        inits = {"kernel_init": nn.initializers.zeros, "bias_init": bias_init}
        return nn.Dense(self.heads, dtype=wide, param_dtype=self.param_dtype, name=name, **inits)


def matrix_lstm(q_BTHK, k_BTHK, v_BTHV, i_BTH, log_f_BTH, state, reset_BT, impl="auto"):
    """All T tokens. Returns (y_BTHV, State)."""
    if impl == "scan":
        xs = q_BTHK, k_BTHK, v_BTHV, i_BTH, log_f_BTH
        y_BTHV, state = ops.recur(jax.vmap(step), state, ops.widen(xs), reset_BT)
        return y_BTHV.astype(v_BTHV.dtype), state
    # Given every m, this is linear attention with decays f' and keys i' k.
    C_BHKV, n_BHK, m_BH = state
    least_BTH = jnp.maximum(i_BTH, 0)
    if reset_BT is not None:  # where m starts at 0
        least_BTH = jnp.where(reset_BT[..., None], jnp.maximum(least_BTH, log_f_BTH), least_BTH)
    before_BTH, m_BTH = ops.max_scan(log_f_BTH, least_BTH, m_BH, reset_BT)
    k_BTHK = (jnp.exp(i_BTH - m_BTH)[..., None] * k_BTHK).astype(k_BTHK.dtype)
    log_decay_BTH = log_f_BTH + before_BTH - m_BTH
    y_BTHV, total_BTH, C_BHKV, n_BHK = ops.normalised_linear_attention(
        q_BTHK, k_BTHK, v_BTHV, log_decay_BTH, C_BHKV, n_BHK, reset_BT, impl=impl
    )
    y_BTHV = y_BTHV / jnp.maximum(jnp.abs(total_BTH), jnp.exp(-m_BTH))[..., None]
    return y_BTHV.astype(v_BTHV.dtype), State(C_BHKV, n_BHK, m_BTH[:, -1])


def spread(first, last, forget_gate):
    """Biases in equal steps over the heads, of a sigmoid; for an exponential gate, what gives the same gates."""

    def init(key, shape, dtype=float):
        bias_H = jnp.linspace(first, last, *shape, dtype=dtype)
        return bias_H if forget_gate == "sigmoid" else nn.log_sigmoid(bias_H)

    return init
