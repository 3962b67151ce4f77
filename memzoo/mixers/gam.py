"""GAM: each token's neighbourhood by a short convolution, and a bank of learned slots by attention, behind a gate each.

    y_t = sigmoid(G_1 x_t + b_1) (sum_w f_w x_{t - (W - 1) + w} + b) + sigmoid(G_2 x_t + b_2) M' softmax(M x_t)

The bank M is a parameter, the same for all sequences, and nothing writes to it: one step of a Hopfield network whose
patterns are learned. All that a sequence leaves behind is the tail of the convolution, so that L layers see L (W - 1)
tokens back, and nothing that was said before them.

Source: Acharya, "Gated Associative Memory: A Parallel O(N) Architecture for Efficient Sequence Modeling" (2025),
arXiv:2509.00605; sizes, biases and initialisation from the released code.
Differs: the norm before the layer, the sum around it, the MLP and positions are the model's.

Dims: B batch, T time, D width, M slots, W conv width, P = W - 1 past inputs, E = 2 D, both gates.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from memzoo import contract, ops
from memzoo.ops.checks import check_impl
from memzoo.ops.chunks import matmul
from memzoo.ops.initial import like_torch, within

FORMS = ("scan", "conv")


class State(NamedTuple):
    past_BPD: jax.Array


def step(past_PD, x_D, f_WD, b_D, bank_MD, gate_E):
    """One token, gate = G x + b. This is the definition; the convolution is tested against it."""
    seen_WD = jnp.concatenate([past_PD, x_D[None]])
    local_D = jnp.sum(f_WD * seen_WD, axis=0) + b_D
    found_D = nn.softmax(bank_MD @ x_D) @ bank_MD
    local_gate_D, found_gate_D = jnp.split(nn.sigmoid(gate_E), 2)
    return seen_WD[1:], local_gate_D * local_D + found_gate_D * found_D


class GAM(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Raises ValueError, by name, for sizes below 1, and for inputs, state or resets that do not fit.
    """

    width: int
    slots: int = 512  # M
    conv_width: int = 3  # W
    impl: str = "auto"  # 'scan', 'conv'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int]:
        """(M, P)"""
        contract.positive(width=self.width, slots=self.slots, conv_width=self.conv_width)
        return self.slots, self.conv_width - 1

    def initial_state(self, batch: int) -> State:
        _, P = self.sizes()
        return State(jnp.zeros((batch, P, self.width), contract.state_dtype(self.dtype)))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        check_impl("gam", self.impl, FORMS)
        (M, P), D, wide = self.sizes(), self.width, contract.state_dtype(self.dtype)

        def param(name, init, *shape):
            return self.param(name, init, shape, self.param_dtype)

        f_WD, b_D = (param(n, within((P + 1) ** -0.5), *shape) for n, shape in (("conv", (P + 1, D)), ("bias", (D,))))
        bank_MD = param("bank", nn.initializers.xavier_uniform(), M, D)
        gates: dict[str, Any] = {"kernel_init": like_torch, "bias_init": within(D**-0.5)}
        gate_BTE = nn.Dense(2 * D, dtype=wide, param_dtype=self.param_dtype, name="gate", **gates)(x_BTD)
        xs = x_BTD.astype(self.dtype), f_WD, b_D, bank_MD, gate_BTE
        y_BTD, past_BPD = gam(*xs, state.past_BPD, reset_BT, self.impl)
        return y_BTD, State(past_BPD)


def gam(x_BTD, f_WD, b_D, bank_MD, gate_BTE, past_BPD, reset_BT, impl="auto"):
    """All T tokens. Returns (y_BTD, past_BPD)."""
    dtype, wide = x_BTD.dtype, past_BPD.dtype
    if impl == "scan":
        f_WD, b_D, bank_MD = (w.astype(wide) for w in (f_WD, b_D, bank_MD))

        def token(past_PD, x_D, gate_E):
            return step(past_PD, x_D, f_WD, b_D, bank_MD, gate_E)

        y_BTD, past_BPD = ops.recur(token, past_BPD, ops.widen((x_BTD, gate_BTE)), reset_BT)
        return y_BTD.astype(dtype), past_BPD
    local_BTD, past_BPD = ops.short_conv(x_BTD, f_WD, past_BPD, reset_BT)
    bank_MD = bank_MD.astype(dtype)
    weight_BTM = nn.softmax(matmul("btd,md->btm", x_BTD, bank_MD))
    found_BTD = matmul("btm,md->btd", weight_BTM.astype(dtype), bank_MD)
    local_gate_BTD, found_gate_BTD = jnp.split(nn.sigmoid(gate_BTE), 2, axis=-1)
    return (local_gate_BTD * (local_BTD + b_D) + found_gate_BTD * found_BTD).astype(dtype), past_BPD
