"""ELM, the Expressive Leaky Memory neuron: leaky traces of its inputs, and slow memories that a network adjusts.

    s_t = kappa_s s_{t-1} + relu(w) x_t                                  kappa = exp(-1 / tau), tau_s fixed
    n_t = 1.7159 tanh(2/3 (W_2 relu(W_1 [s_t, kappa_m m_{t-1}] + b) + b))
    m_t = kappa_m m_{t-1} + lambda (1 - kappa_m) n_t                     tau_m from tau_min to tau_max
    y_t = W_out m_t

With `branches`, the Branch-ELM: each branch sums the synapses of a window of inputs, and s is of branches.

Source: Spieler, Rahaman, Martius, Schoelkopf, Levina, "The Expressive Leaky Memory Neuron: an Efficient and Expressive
Phenomenological Neuron Model Can Solve Long-Horizon Tasks" (2023), arXiv:2306.16922; squashing and initial values from
its released code, first version (its second has 1 - exp(-lambda / tau_m) in place of lambda (1 - kappa_m)).
Differs: a branch's trace is the sum of its synapses' traces, which decay alike. Windows begin at m D / M on a ring of
the inputs as they come; the code's begin at multiples of ceil(D / M) and end at the last input, after excitatory and
inhibitory inputs have been interlaced. One hidden layer; no bias in the readout, whose weights begin as Flax's do.

Dims: B batch, T time, D width, M branches, S synapses of each, N memories, F hidden units of the network, J = M + N.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from memzoo import contract, ops
from memzoo.ops.initial import within


class State(NamedTuple):
    s_BM: jax.Array
    m_BN: jax.Array


def step(s_M, m_N, u_M, kappa_s, tau_N, lambda_, W_JF, b_F, W_FN, b_N):
    """One token; u = relu(w) x, branch by branch. This is the definition; every faster form is tested against it."""
    s_M = kappa_s * s_M + u_M
    return s_M, adjust(m_N, s_M @ W_JF[: s_M.size] + b_F, tau_N, lambda_, W_JF[s_M.size :], W_FN, b_N)


def adjust(m_N, a_F, tau_N, lambda_, U_NF, W_FN, b_N):
    """The memories' half of a token, where a = W s + b is what the traces say to the hidden units."""
    kept_N = jnp.exp(-1 / tau_N) * m_N
    n_N = nn.relu(a_F + kept_N @ U_NF) @ W_FN + b_N
    return kept_N - lambda_ * jnp.expm1(-1 / tau_N) * (1.7159 * jnp.tanh(2 / 3 * n_N))


class ELM(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Raises ValueError, by name, for time constants that are not in order, for a negative weight or gain, for more
    synapses than inputs, and for inputs, state or resets that do not fit.
    """

    width: int
    memories: int = 100  # N
    hidden: int | None = None  # F; twice the memories
    branches: int | None = None  # M; None, the ELM, is one for each input
    synapses: int | None = None  # S, of each branch; as few as reach all inputs
    tau_s: float = 5.0  # of traces, in tokens
    tau_min: float = 1.0  # of memories, which are spaced evenly in log tau
    tau_max: float = 1000.0
    learn_tau: bool = False  # of memories, between tau_min and tau_max
    lambda_: float = 5.0  # the gain of a memory
    w_init: float = 0.5  # of all synapses at the start
    impl: str = "auto"  # 'scan', 'newton'
    jacobian: str = "auto"  # see ops.newton_scan: how 'newton' iterates, not what it finds
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int, int, int]:
        """(M, S, N, F)"""
        D, N = self.width, self.memories
        contract.positive(width=D, memories=N)
        F = 2 * N if self.hidden is None else self.hidden
        M = D if self.branches is None else self.branches
        contract.positive(hidden=F, branches=M)
        S = -(-D // M) if self.synapses is None else self.synapses
        contract.positive(synapses=S)
        ops.check_jacobian(self.jacobian)
        if S > D:
            raise ValueError(f"synapses: expected at most width = {D}, got {S}")
        if not self.tau_s > 0:
            raise ValueError(f"tau_s: expected a number > 0, got {self.tau_s}")
        if not 0 < self.tau_min <= self.tau_max or (self.learn_tau and self.tau_min == self.tau_max):
            order = f"0 < tau_min {'<' if self.learn_tau else '<='} tau_max"
            raise ValueError(f"tau_min, tau_max: expected {order}, got {self.tau_min}, {self.tau_max}")
        if not self.lambda_ > 0 or not self.w_init > 0:
            raise ValueError(f"lambda_, w_init: expected numbers > 0, got {self.lambda_}, {self.w_init}")
        return M, S, N, F

    def initial_state(self, batch: int) -> State:
        (M, _, N, _), wide = self.sizes(), contract.state_dtype(self.dtype)
        return State(jnp.zeros((batch, M), wide), jnp.zeros((batch, N), wide))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        (M, S, N, F), D, wide = self.sizes(), self.width, contract.state_dtype(self.dtype)

        def param(name, init, *shape):
            return self.param(name, init, shape, self.param_dtype).astype(wide)

        w_MS = nn.relu(param("synapses", nn.initializers.constant(self.w_init), M, S))
        inputs_MS = (np.arange(M)[:, None] * D // M + np.arange(S)) % D
        w_DM = jnp.zeros((D, M), wide).at[inputs_MS, np.arange(M)[:, None]].set(w_MS)
        x_BTD = x_BTD.astype(self.dtype)
        u_BTM = jnp.einsum("btd,dm->btm", x_BTD, w_DM.astype(self.dtype), preferred_element_type=wide)

        spread_N = np.geomspace(self.tau_min, self.tau_max, N)
        tau_N = jnp.asarray(spread_N, wide)
        if self.learn_tau:
            part_N = param("tau", lambda key, shape, dtype: odds(spread_N, self.tau_min, self.tau_max, dtype), N)
            tau_N = self.tau_min + (self.tau_max - self.tau_min) * nn.sigmoid(part_N)
        of_1, of_2 = within((M + N) ** -0.5), within(F**-0.5)
        weights = param("W_1", of_1, M + N, F), param("b_1", of_1, F), param("W_2", of_2, F, N), param("b_2", of_2, N)

        m_BTN, state = elm(u_BTM, self.tau_s, tau_N, self.lambda_, *weights, state, reset_BT, self.impl, self.jacobian)
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return nn.Dense(D, use_bias=False, name="out", **kinds)(m_BTN), state


def elm(u_BTM, tau_s, tau_N, lambda_, W_JF, b_F, W_FN, b_N, state, reset_BT, impl="auto", jacobian="auto"):
    """All T tokens. Returns (m_BTN, State)."""
    kappa_s, M = math.exp(-1 / tau_s), u_BTM.shape[-1]
    if impl == "scan":
        rest = kappa_s, tau_N, lambda_, W_JF, b_F, W_FN, b_N

        def token(state, u_M):
            state = State(*step(*state, u_M, *rest))
            return state, state.m_BN

        return ops.recur(token, state, (u_BTM,), reset_BT)
    # Traces know nothing of memories, so they come first, of all tokens, and what they say to the hidden units.
    traces_impl = "associative" if impl == "newton" else impl
    s_BTM, s_BM = ops.linear_scan(jnp.full_like(u_BTM, kappa_s), u_BTM, state.s_BM, reset_BT, impl=traces_impl)
    a_BTF = jnp.einsum("btm,mf->btf", s_BTM, W_JF[:M], precision="highest") + b_F
    one = partial(adjust, tau_N=tau_N, lambda_=lambda_, U_NF=W_JF[M:], W_FN=W_FN, b_N=b_N)
    m_BTN, m_BN = ops.nonlinear_scan(one, state.m_BN, a_BTF, reset_BT, impl=impl, jacobian=jacobian)
    return m_BTN, State(s_BM, m_BN)


def odds(tau_N, low, high, dtype):
    """log of (tau - low) / (high - tau), kept off the ends, where it has no gradient."""
    part_N = np.clip((tau_N - low) / (high - low), 1e-6, 1 - 1e-6)
    return jnp.asarray(np.log(part_N / (1 - part_N)), dtype)
