"""RWKV-7: the delta rule with a decay and a learning rate per key channel, and a written key beside the erased one.

    S_t = (diag(w_t) - (a_t * kappa_t) kappa_t') S_{t-1} + k_t v_t'        y_t = S_t' r_t
    w_t = exp(-e^-1/2 sigmoid(d_t))    kappa_t = (k0_t * xi) / |k0_t * xi|    k_t = k0_t * (1 + (a_t - 1) * alpha)

Source: Peng et al., "RWKV-7 'Goose' with Expressive Dynamic State Evolution" (2025), arXiv:2503.14456, the time mixing
of sec. 4; ranks and initialisation from the released code (RWKV-LM), for layer `layer` of `layers`.
Differs: S is [K, V], the paper's transpose. The paper mixes the first layer's values into those of later layers; a
mixer knows no other layer, so this is the first layer's time mixing, at any depth. Channel mixing is the model's part.

Dims: B batch, T time, D width, H heads, K key, V value, P = 1 past input, M = 6 mixes of a token with the one before,
      E = H K, the channels of keys, or H V, those of values.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from memzoo import contract, ops

MIXES = {"r": 0.2, "d": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}  # the power in the initial value of each


class State(NamedTuple):
    S_BHKV: jax.Array
    past_BPD: jax.Array


def step(S_KV, r_K, k_K, v_V, kappa_K, a_K, log_w_K):
    """One token, one head. This is the definition; every faster form is tested against it."""
    erased_KV = jnp.outer(a_K * kappa_K, kappa_K @ S_KV)
    S_KV = jnp.exp(log_w_K)[:, None] * S_KV - erased_KV + jnp.outer(k_K, v_V)
    return S_KV, r_K @ S_KV


class RWKV7(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    `layer` and `layers` say where in a stack this is, and change initial values alone. As released, `out` begins at 0.
    Raises ValueError, by name, for a width that heads do not divide, a layer that is not one of `layers`, and for
    inputs, state or resets that do not fit.
    """

    width: int
    heads: int | None = None  # width / 64, or by the largest divisor of 64 that divides width
    key_dim: int | None = None  # per head; width / heads
    value_dim: int | None = None  # per head; width / heads
    decay_rank: int | None = None  # of d; 2.5 sqrt(width), to a multiple of 32
    rate_rank: int | None = None  # of a, the in-context learning rate; the same
    gate_rank: int | None = None  # 5 sqrt(width), to a multiple of 32
    layer: int = 0
    layers: int = 1
    impl: str = "auto"  # 'scan', 'associative', 'chunk'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int, int]:
        """(H, K, V)"""
        contract.positive(width=self.width, layers=self.layers)
        H = self.width // math.gcd(64, self.width) if self.heads is None else self.heads
        per_head = contract.divisible("width", self.width, "heads", H)
        K = self.key_dim if self.key_dim is not None else per_head
        V = self.value_dim if self.value_dim is not None else per_head
        contract.positive(key_dim=K, value_dim=V)
        if not contract.whole_number(self.layer) or not 0 <= self.layer < self.layers:
            raise ValueError(f"layer: expected an integer in [0, layers = {self.layers}), got {self.layer!r}")
        self.ranks()
        return H, K, V

    def ranks(self) -> tuple[int, int, int]:
        """Of decay, rate and output gate."""
        suggested = lambda scale: max(32, 32 * round(scale * self.width**0.5 / 32))
        given = {"decay_rank": self.decay_rank, "rate_rank": self.rate_rank, "gate_rank": self.gate_rank}
        ranks = [suggested(s) if rank is None else rank for rank, s in zip(given.values(), (2.5, 2.5, 5), strict=True)]
        contract.positive(**dict(zip(given, ranks, strict=True)))
        return ranks[0], ranks[1], ranks[2]

    def initial_state(self, batch: int) -> State:
        wide = contract.state_dtype(self.dtype)
        return State(jnp.zeros((batch, *self.sizes()), wide), jnp.zeros((batch, 1, self.width), wide))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        (H, K, V), (B, T, D) = self.sizes(), x_BTD.shape
        wide = contract.state_dtype(self.dtype)
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        gates: dict[str, Any] = {"dtype": wide, "param_dtype": self.param_dtype}

        def linear(name, size, init, x_BTD):
            return nn.Dense(size, use_bias=False, kernel_init=init, name=name, **kinds)(x_BTD)

        def low_rank(name, rank, size, function, x_BTD, dtypes, bias=None):
            """bias + W2 function(W1 x), where W1 begins at 0: at first there is the bias alone."""
            zeros, shrunk = nn.initializers.zeros, orthogonal(0.1 * max(1, rank / size) ** 0.5)
            inner = nn.Dense(rank, use_bias=False, kernel_init=zeros, name=f"{name}_in", **dtypes)(x_BTD)
            outer = {"use_bias": bias is not None, "bias_init": bias or zeros, "kernel_init": shrunk, **dtypes}
            return nn.Dense(size, name=f"{name}_out", **outer)(function(inner))

        x_BTD = x_BTD.astype(self.dtype)
        before_BTD, past_BPD = ops.short_conv(x_BTD, jnp.eye(2, 1).repeat(D, 1), state.past_BPD, reset_BT)
        mu_MD = self.param("mix", mix(1 - self.layer / self.layers), (len(MIXES), D), self.param_dtype)
        mixes_MBTD = x_BTD + (before_BTD - x_BTD) * mu_MD[:, None, None].astype(self.dtype)
        x_r, x_d, x_k, x_v, x_a, x_g = mixes_MBTD

        r_BTHK = linear("r", H * K, orthogonal(), x_r).reshape(B, T, H, K)
        k_BTHK = linear("k", H * K, orthogonal(0.1), x_k).reshape(B, T, H, K)
        v_BTHV = linear("v", H * V, orthogonal(), x_v).reshape(B, T, H, V)
        decay_rank, rate_rank, gate_rank = self.ranks()
        depth = self.layer / max(self.layers - 1, 1)
        d_BTE = low_rank("decay", decay_rank, H * K, jnp.tanh, x_d, gates, decay_bias(K, depth))
        a_BTE = low_rank("rate", rate_rank, H * K, lambda x: x, x_a, gates, rate_bias(K))
        g_BTE = low_rank("gate", gate_rank, H * V, nn.sigmoid, x_g, kinds)
        log_w_BTHK = -math.exp(-0.5) * nn.sigmoid(d_BTE).reshape(B, T, H, K)
        a_BTHK = nn.sigmoid(a_BTE).reshape(B, T, H, K)

        xi_HK = self.param("xi", erased_scale, (H, K), self.param_dtype).astype(wide)
        alpha_HK = self.param("alpha", nn.initializers.constant(1.02), (H, K), self.param_dtype).astype(wide)
        kappa_BTHK = ops.unit(k_BTHK * xi_HK, 1e-12)  # a small epsilon, as initial keys are short
        k_BTHK = (k_BTHK * (1 + (a_BTHK - 1) * alpha_HK)).astype(self.dtype)

        y_BTHV, S_BHKV = wkv(r_BTHK, k_BTHK, v_BTHV, kappa_BTHK, a_BTHK, log_w_BTHK, state.S_BHKV, reset_BT, self.impl)

        scale = nn.initializers.constant(((self.layer + 1) / self.layers) ** 0.7)
        norm = nn.LayerNorm(1e-5 * V, feature_axes=(-2, -1), scale_init=scale, name="norm", **kinds)
        rho_HK = self.param("rho", nn.initializers.constant(-0.04), (H, K), self.param_dtype).astype(wide)
        bonus_BTH1 = jnp.sum(r_BTHK * rho_HK * k_BTHK, -1, keepdims=True)
        y_BTHV = norm(y_BTHV) + bonus_BTH1.astype(self.dtype) * v_BTHV
        return linear("out", D, nn.initializers.zeros, y_BTHV.reshape(B, T, H * V) * g_BTE), State(S_BHKV, past_BPD)


def wkv(r_BTHK, k_BTHK, v_BTHV, kappa_BTHK, a_BTHK, log_w_BTHK, S_BHKV, reset_BT, impl="auto"):
    """All T tokens. Returns (y_BTHV, S_BHKV)."""
    if impl == "scan":
        xs = r_BTHK, k_BTHK, v_BTHV, kappa_BTHK, a_BTHK, log_w_BTHK
        y_BTHV, S_BHKV = ops.recur(jax.vmap(step), S_BHKV, ops.widen(xs), reset_BT)
        return y_BTHV.astype(v_BTHV.dtype), S_BHKV
    kappa, b_BTHK = (x.astype(k_BTHK.dtype) for x in (kappa_BTHK, -a_BTHK * kappa_BTHK))
    return ops.dplr_delta_rule(r_BTHK, k_BTHK, v_BTHV, kappa, b_BTHK, log_w_BTHK, S_BHKV, reset_BT, impl=impl)


def orthogonal(scale=1.0):
    """In float32 at least, as no narrower QR decomposition exists."""
    init = nn.initializers.orthogonal(scale)
    return lambda key, shape, dtype=float: init(key, shape, jnp.promote_types(dtype, jnp.float32)).astype(dtype)


def mix(less):
    """1 - (i / D)^(less power) of the token before: the most in the first channels, and less the deeper the layer."""

    def init(key, shape, dtype=float):
        powers_M1 = less * jnp.array(list(MIXES.values()))[:, None]
        return (1 - (jnp.arange(shape[1]) / shape[1]) ** powers_M1).astype(dtype)

    return init


def along(shape):
    """-1/2 to 1/2 over all channels."""
    return jnp.linspace(-0.5, 0.5, math.prod(shape)).reshape(shape)


def zigzag(K, E):
    """-1 to 1 over the channels of each head, flat in the middle: z |z|."""
    z_E = jnp.tile(jnp.linspace(-1, 1, K), E // K)
    return z_E * jnp.abs(z_E)


def decay_bias(K, depth):
    """Of d: memories of 1.7 to some 4,900 tokens in the first layer; the deeper the layer, the more long ones."""

    def init(key, shape, dtype=float):
        rise_E = (along(shape) + 0.5) ** (1 + depth**0.3)
        return (-5.5 + 6 * rise_E + 2.5 * zigzag(K, *shape)).astype(dtype)

    return init


def rate_bias(K):
    return lambda key, shape, dtype=float: (-0.19 + 0.3 * zigzag(K, *shape) + 0.4 * along(shape)).astype(dtype)


def erased_scale(key, shape, dtype=float):
    return (0.71 - 0.1 * along(shape)).astype(dtype)
