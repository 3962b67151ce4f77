"""xLSTMTime: a forecast of many variables, made linearly in time and then refined by an xLSTM that reads the variables.

    x = gamma (x - mean) / deviation + beta                   per series, undone at the end (RevIN)
    trend = moving average of x, season = x - trend           ends repeated, so that both are as long as x
    z = W [W trend + b + W season + b] + b                    over time: T -> S -> width, for each variable
    y = W LN(blocks(z)) + b                                   variables are the tokens; width -> S

Source: Alharthi, Mahmood, "xLSTMTime: Long-term Time Series Forecasting With xLSTM" (2024), arXiv:2407.10240, sec. 3,
and its released code, whose sequence is that of the variables, in their order, and whose batch norm is commented out;
Kim, Kim, Tae, Park, Choi, Choo, "Reversible Instance Normalization for Accurate Time-Series Forecasting against
Distribution Shift" (2022), ICLR.
Differs: no batch norm, as in that code, and no dropout.

Dims: B batch, T time that is known, S time to come, D variables, F width.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from memzoo import contract
from memzoo.models.xlstm import blocks, layer_norm
from memzoo.ops.initial import like_torch, within


def decompose(x_BTD: jax.Array, window: int) -> tuple[jax.Array, jax.Array]:
    """(trend_BTD, season_BTD), which sum to x: the mean of the `window` values around each, and what is left."""
    contract.positive(window=window)
    if window % 2 == 0:
        raise ValueError(f"window: expected an odd number, got {window}")
    half = window // 2
    padded = jnp.pad(x_BTD, ((0, 0), (half, half), (0, 0)), mode="edge")
    trend_BTD = lax.reduce_window(padded, 0.0, lax.add, (1, window, 1), (1, 1, 1), "VALID") / window
    return trend_BTD, x_BTD - trend_BTD


class XLSTMTime(nn.Module):
    """x_BTD -> y_BSD, T = context, S = horizon. Float32, or float64 when `dtype` is.

    Raises ValueError, by name, for sizes below 1, a window that is even, what memzoo.models.xlstm.XLSTM refuses of a
    stack, and for an input of another shape or dtype.
    """

    context: int = 512  # T
    horizon: int = 96  # S
    width: int = 256  # F
    layers: int = 3
    ratio: str = "1:0"  # of mLSTM to sLSTM blocks; the paper takes sLSTM, "0:1", for small sets of data
    window: int = 25  # of the moving average
    heads: int = 4
    inner: int | None = None  # of an mLSTM block; 2 width, up to a multiple of 64
    hidden: int | None = None  # of an sLSTM block's MLP; 1.3 width, up to a multiple of 64
    qkv_block: int = 4
    normalise: bool = True  # each series, by its own mean and deviation
    impl: str = "auto"  # of mLSTM: 'scan', 'associative', 'chunk'
    slstm_impl: str = "auto"  # 'scan', 'newton'
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        contract.positive(context=self.context, horizon=self.horizon, window=self.window)
        contract.check_numbers(self)
        if self.window % 2 == 0:
            raise ValueError(f"window: expected an odd number, got {self.window}")
        self.blocks()
        super().__post_init__()

    def blocks(self) -> list[Any]:
        """The class of each layer and its fields."""
        sizes = ("width", "layers", "ratio", "heads", "inner", "hidden", "qkv_block")
        kinds = ("impl", "slstm_impl", "dtype", "param_dtype")
        return blocks(**{name: getattr(self, name) for name in (*sizes, *kinds)})

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        if np.ndim(x_BTD) != 3 or np.shape(x_BTD)[1] != self.context or np.shape(x_BTD)[2] == 0:
            raise ValueError(f"x_BTD: expected shape [B, T = {self.context}, D >= 1], got {list(np.shape(x_BTD))}")
        if not jnp.issubdtype(x_BTD.dtype, jnp.floating):
            raise ValueError(f"x_BTD: expected a floating dtype, got {x_BTD.dtype}")
        T, S, D, wide = self.context, self.horizon, x_BTD.shape[-1], contract.state_dtype(self.dtype)

        x_BTD = x_BTD.astype(wide)
        mean, deviation, gamma_D, beta_D = (jnp.asarray(n, wide) for n in (0, 1, 1, 0))
        if self.normalise:
            mean = lax.stop_gradient(jnp.mean(x_BTD, 1, keepdims=True))
            deviation = lax.stop_gradient(jnp.sqrt(jnp.var(x_BTD, 1, keepdims=True) + 1e-5))
            gamma_D = self.param("gamma", nn.initializers.ones, (D,), self.param_dtype).astype(wide)
            beta_D = self.param("beta", nn.initializers.zeros, (D,), self.param_dtype).astype(wide)
        trend_BTD, season_BTD = decompose(gamma_D * (x_BTD - mean) / deviation + beta_D, self.window)

        def linear(name, size, inputs, kernel_init=like_torch):
            inits: dict[str, Any] = {"kernel_init": kernel_init, "bias_init": within(inputs**-0.5)}
            return nn.Dense(size, name=name, dtype=self.dtype, param_dtype=self.param_dtype, **inits)

        ahead = [linear(name, S, T, nn.initializers.constant(1 / T)) for name in ("trend", "season")]
        z_BDS = ahead[0](jnp.swapaxes(trend_BTD, 1, 2)) + ahead[1](jnp.swapaxes(season_BTD, 1, 2))
        z_BDF = linear("in", self.width, S)(z_BDS)
        for l, (kind, fields) in enumerate(self.blocks()):
            z_BDF, _ = kind(**fields, name=f"layer_{l}")(z_BDF, None, None)
        y_BDS = linear("out", S, self.width)(layer_norm(self, "norm")(z_BDF))
        y_BSD = jnp.swapaxes(y_BDS, 1, 2).astype(wide)
        return (y_BSD - beta_D) / (gamma_D + 1e-10) * deviation + mean
