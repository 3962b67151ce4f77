"""Titans MAG, memory as a gate: what attention over a sliding window says, gated by what the neural memory says.

    o = norm(SW-Attn([p | u])) * sigmoid(norm(M([p | u])))        u = norm(x)        x = x + o

M is memzoo.mixers.titans, which reads the persistent tokens p before all else; in attention all tokens see p beside
their window. Norms have learned scales.

Source: Behrouz, Zhong, Mirrokni, "Titans: Learning to Memorize at Test Time" (2024), arXiv:2501.00663, sec. 4.2, eq.
26-28, for its gate what the paper says of its experiments, and 4.4 for residual connections.
Differs: the stack is that of memzoo.models.titans. p have no places: see memzoo.ops.prefix_attention.

Dims: B batch, T time, D width, N persistent tokens.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from memzoo.models.titans import Gate, Titans, WindowLayer, WindowState


class Layer(WindowLayer):
    def setup(self):
        self.memory, self.attention = self.parts()
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.norm, self.gate = nn.RMSNorm(**kinds), Gate(**kinds)

    def __call__(
        self, x_BTD: jax.Array, state: WindowState | None, reset_BT: jax.Array | None
    ) -> tuple[jax.Array, WindowState]:
        memory, window = (None, None) if state is None else state
        u_BTD = self.norm(x_BTD)
        m_BTD, memory = self.memory(u_BTD, memory, reset_BT)
        p_ND = jnp.zeros((0, self.width), self.param_dtype)
        if self.memory_fields["persistent"]:
            p_ND = self.memory.get_variable("params", "persistent")
        y_BTD, window = self.attention(u_BTD, window, reset_BT, p_ND)
        return x_BTD + self.gate(y_BTD, m_BTD), WindowState(memory, window)


class TitansMAG(Titans):
    window: int = 1024

    def layer(self) -> tuple[Any, dict[str, Any]]:
        return Layer, {"window": self.window}
