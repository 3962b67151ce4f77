"""Titans MAL, memory as a layer: the neural memory reads the text, and attention over a window what it makes of it.

    x = x + M([p | norm(x)])        x = x + SW-Attn([p' | norm(x)])        in every layer, before its MLP

M is memzoo.mixers.titans, which reads its persistent tokens p before all else; p' are tokens that all see beside their
window.

Source: Behrouz, Zhong, Mirrokni, "Titans: Learning to Memorize at Test Time" (2024), arXiv:2501.00663, sec. 4.3, eq.
29-31, and 4.4 for residual connections.
Differs: the paper's attention sees M(p) in front of the text. That is the same for all texts, so p' is learned as it
is; and it stays in sight, where a window leaves it behind. The stack is that of memzoo.models.titans.

Dims: B batch, T time, D width, N persistent tokens.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from memzoo.models.titans import Titans, WindowLayer, WindowState


class Layer(WindowLayer):
    def setup(self):
        self.memory, self.attention = self.parts()
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.memory_norm, self.attention_norm = nn.RMSNorm(**kinds), nn.RMSNorm(**kinds)
        self.persistent_ND = jnp.zeros((0, self.width), self.param_dtype)
        if N := self.memory_fields["persistent"]:
            normal = nn.initializers.normal(1.0)
            self.persistent_ND = self.param("persistent", normal, (N, self.width), self.param_dtype)

    def __call__(
        self, x_BTD: jax.Array, state: WindowState | None, reset_BT: jax.Array | None
    ) -> tuple[jax.Array, WindowState]:
        memory, window = (None, None) if state is None else state
        y_BTD, memory = self.memory(self.memory_norm(x_BTD), memory, reset_BT)
        x_BTD = x_BTD + y_BTD
        y_BTD, window = self.attention(self.attention_norm(x_BTD), window, reset_BT, self.persistent_ND)
        return x_BTD + y_BTD, WindowState(memory, window)


class TitansMAL(Titans):
    window: int = 1024

    def layer(self) -> tuple[Any, dict[str, Any]]:
        return Layer, {"window": self.window}
