"""Titans MAC, memory as a context: attention inside a segment, with what the memory knew before it in front.

    h_t = M_s(u_t)                                          s the last token before the segment of t, u = norm(x)
    y_t = norm(Attn(u_t, [p | h_{s+1} ... h_t | u_{s+1} ... u_t]))
    M_t = M_{t-1} that has learned y_t                      memzoo.mixers.titans, of y
    o_t = y_t * sigmoid(norm(M_t(y_t)))                     x = x + o

A segment begins every `segment` tokens from the last reset on, wherever calls begin and end.

Source: Behrouz, Zhong, Mirrokni, "Titans: Learning to Memorize at Test Time" (2024), arXiv:2501.00663, sec. 4.1, eq.
21-25, and 4.4 for norms, convolutions and residual connections; the gate is that of its sec. 4.2.
Differs: in the paper a token sees the h of its whole segment (fig. 3a), which queries of tokens to come have read, and
o is read from the memory after the whole segment. Here both end at the token itself, so that the model is causal. The
y that the memory learns are normed. p stand at the places 0 ... N - 1, then h at those of a whole segment, then u. The
stack is that of memzoo.models.titans.

Dims: B batch, T time, D width, G heads of attention, R their keys and values, Y a key and a value, H heads of the
      memory, K key, V value, E = H (2 K + V), P past inputs of convolutions, N persistent tokens, C segment, L tokens
      of a block, X keys.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax import lax
from jax.typing import DTypeLike

from memzoo import contract, ops, zoo
from memzoo.mixers.titans import bias
from memzoo.models.titans import Titans
from memzoo.ops.chunks import matmul
from memzoo.ops.initial import lecun, within
from memzoo.ops.memory import Weights, add, dense, half_square, mlp
from memzoo.ops.rotary import places, turn


class State(NamedTuple):
    """Of a layer."""

    memory: ops.MemoryState
    start: Weights  # the memory's where the segment began, as they differ from A_0
    asked_BPE: jax.Array  # the last queries to the convolution, of u
    told_BPE: jax.Array  # and the last of y, with keys and values
    cache_BC2GY: jax.Array  # of the segment so far, of h and of u; zeros behind
    place_B: jax.Array  # int32, tokens of the segment that have been


class Layer(nn.Module):
    """x_BTD, State or None, reset_BT -> x_BTD, State."""

    width: int
    heads: int
    memory_fields: FrozenDict
    segment: int
    impl: str
    dtype: DTypeLike
    param_dtype: DTypeLike

    def titans(self) -> Any:
        return zoo.make("titans", parent=None, **self.memory_fields)

    def initial_state(self, batch: int) -> State:
        contract.positive(segment=self.segment)
        R = contract.divisible("width", self.width, "heads", self.heads)
        if R % 2:
            raise ValueError(f"heads: expected an even width / heads, to turn pairs, got {self.width} / {self.heads}")
        titans = self.titans()
        (H, K, _, _, P), (memory, told_BPE) = titans.sizes(), titans.initial_state(batch)
        zeros = lambda *shape: jnp.zeros((batch, *shape), told_BPE.dtype)
        cache_BC2GY = zeros(self.segment, 2, self.heads, 2 * R)
        return State(memory, memory.A, zeros(P, H * K), told_BPE, cache_BC2GY, memory.place_B)

    @nn.compact
    def __call__(self, x_BTD: jax.Array, state: State | None, reset_BT: jax.Array | None) -> tuple[jax.Array, State]:
        (B, T, D), C, titans = x_BTD.shape, self.segment, self.titans()
        (H, K, V, _, P), N = titans.sizes(), titans.persistent
        by_token = self.impl == "scan" or (self.impl == "auto" and T == 1)
        fresh = state is None and reset_BT is None and not by_token  # each block is a segment
        state = self.initial_state(B) if state is None else state
        reset_BT = jnp.zeros((B, T), bool) if reset_BT is None else reset_BT

        matrix, E, one = nn.initializers.lecun_normal(), H * (2 * K + V), nn.initializers.ones
        begins: dict[str, Any] = {f"kernel_{name}": (matrix, (D, D)) for name in ("q", "k", "v", "out")}
        begins |= {"kernel_told": (matrix, (D, E)), "conv": (within((P + 1) ** -0.5), (P + 1, E))}
        begins |= {"kernel_gates": (matrix, (D, 3 * H)), "bias_gates": (bias, (3 * H,))}
        begins |= {"kernel_read": (matrix, (H * V, D)), "scale_read": (one, (V,))}
        begins |= {"scale_attended": (one, (D,)), "scale_remembered": (one, (D,))}
        begins |= {f"memory_{n}": (lecun, shape) for n, shape in titans.shapes().items()}
        begins |= {"persistent": (nn.initializers.normal(1.0), (N, D))} if N else {}
        p = {name: self.param(name, init, shape, self.param_dtype) for name, (init, shape) in begins.items()}
        p.setdefault("persistent", jnp.zeros((0, D)))

        u_BTD = nn.RMSNorm(dtype=self.dtype, param_dtype=self.param_dtype, name="norm")(x_BTD)
        asked_BTE, queries = project(u_BTD, p["kernel_told"][:, : H * K]), p["conv"][:, : H * K]
        asked_BTE, asked_BPE = ops.short_conv(asked_BTE, queries, state.asked_BPE, reset_BT)
        asked_BTHK = ops.unit(split(nn.silu(asked_BTE), H))
        count_BT = places(state.place_B, T, reset_BT) % C
        at_BT = N + C + count_BT
        q_BTGR = turn(split(project(u_BTD, p["kernel_q"]), self.heads), at_BT)
        xs = q_BTGR, keys_and_values(p, u_BTD, self.heads, at_BT), asked_BTHK, count_BT, reset_BT

        run = partial(block, p, titans, "scan" if by_token else "chunk", fresh)
        (y_BTD, m_BTD), state = fold(run, state, xs, 1 if by_token else min(C, T))
        o_BTD = y_BTD * nn.sigmoid(norm(m_BTD, p["scale_remembered"]))
        return x_BTD + o_BTD, state._replace(asked_BPE=asked_BPE)


def block(p, titans, impl, fresh, state, xs):
    """At most C tokens: (State, (y_BLD, what of the memory is read for them)).

    They are of the segment that came, of the next one of the same text, or of what begins at resets. These read the
    memory as it was where the segment began, as it is once it has learned the tokens before, and as a text begins.
    fresh: they are all of one segment that begins with them, or are the last of that.
    """
    q_BLGR, kv_BLGY, asked_BLHK, count_BL, reset_BL = xs
    (B, L, G, _), N, (H, K, _, _, _) = q_BLGR.shape, len(p["persistent"]), titans.sizes()
    A = {n: p[f"memory_{n}"].astype(state.told_BPE.dtype) for n in state.start}
    aligned = fresh and state.cache_BC2GY.shape[1] % titans.chunk == 0  # segments begin with a chunk
    if not fresh:  # what came in must not pass a reset at the first token
        state = either(reset_BL[:, 0], jax.tree.map(jnp.zeros_like, state), state)
    start = either(count_BL[:, 0] == 0, state.memory.A, state.start)
    later_L, zeros = jnp.arange(L) > 0, jax.tree.map(jnp.zeros_like, start)
    reset_BL, section_BL = reset_BL & later_L, jnp.cumsum((count_BL == 0) & later_L, axis=1)
    anew_BL = jnp.cumsum(reset_BL, axis=1) > 0
    next_BL = (section_BL > 0) & ~anew_BL
    prefix_NGY = keys_and_values(p, p["persistent"].astype(kv_BLGY.dtype)[None], G, jnp.arange(N)[None])[0]

    def through(there, reset_BL, keep_BL):
        """The block, where `there` is what the next segment reads. The memory learns from the tokens to keep alone."""
        h_BLHV = ask(titans, A, start, asked_BLHK)
        if L > 1 and not fresh:
            of_next, of_new = ask(titans, A, there, asked_BLHK), ask(titans, A, zeros, asked_BLHK)
            tokens = lambda is_BL, x, y: jnp.where(is_BL[..., None, None], x, y)
            h_BLHV = tokens(anew_BL, of_new, tokens(next_BL, of_next, h_BLHV))
        h_BLD = read(p, h_BLHV.astype(kv_BLGY.dtype))
        kv_BL2GY = jnp.stack([keys_and_values(p, h_BLD, G, N + count_BL), kv_BLGY], axis=2)
        past = state.cache_BC2GY[:, :0] if fresh else state.cache_BC2GY
        y_BLD = attend(q_BLGR, kv_BL2GY, prefix_NGY, past, section_BL, count_BL[:, 0])
        y_BLD = norm(project(y_BLD, p["kernel_out"]), p["scale_attended"])

        told_BLE, told_BPE = ops.short_conv(project(y_BLD, p["kernel_told"]), p["conv"], state.told_BPE, reset_BL)
        q_BLHK, k_BLHK, v_BLHV = (split(z, H) for z in jnp.split(nn.silu(told_BLE), [H * K, 2 * H * K], axis=-1))
        gates_BLE = project(y_BLD.astype(told_BPE.dtype), p["kernel_gates"]) + p["bias_gates"]
        theta_BLH, eta_BLH, alpha_BLH = jnp.split(nn.sigmoid(gates_BLE), 3, axis=-1)
        step = 1 / titans.chunk if titans.step is None else titans.step
        kept = lambda x, y: jnp.where(keep_BL[..., None], x, y)
        theta_BLH = kept(step * (1 - eta_BLH) * theta_BLH, 0.0)
        rate_BLH = kept(jnp.ones_like(theta_BLH), 0.0)
        gates = ops.Gates(theta_BLH, kept(eta_BLH, 1.0), kept(alpha_BLH, 0.0), rate_BLH)
        told = ops.unit(q_BLHK), ops.unit(k_BLHK), v_BLHV, gates, state.memory, None if aligned else reset_BL
        network = partial(mlp, titans.depth), half_square
        m_BLHV, memory = ops.memorize(*network, A, *told, chunk=titans.chunk, impl=impl, aligned=aligned)
        return memory, told_BPE, kv_BL2GY, y_BLD, read(p, m_BLHV)

    everything, there = jnp.ones((B, L), bool), zeros
    if L > 1 and not fresh:
        before = lambda: through(zeros, jnp.zeros_like(reset_BL), section_BL == 0)[0].A
        there = lax.cond(jnp.any(next_BL), before, lambda: zeros)
    memory, told_BPE, kv_BL2GY, y_BLD, m_BLD = through(there, reset_BL, everything)
    start = either(anew_BL[:, -1], zeros, either(next_BL[:, -1], there, start))
    cache_BC2GY = newest(kv_BL2GY, state.cache_BC2GY, count_BL)
    place_B = (count_BL[:, -1] + 1) % cache_BC2GY.shape[1]
    return State(memory, start, state.asked_BPE, told_BPE, cache_BC2GY, place_B), (y_BLD, m_BLD)


def either(is_B, x, y):
    """x in the rows where it is, else y."""
    return jax.tree.map(lambda x, y: jnp.where(is_B.reshape(-1, *[1] * (x.ndim - 1)), x, y), x, y)


def fold(run, state, xs, L):
    """L tokens at a time, and what is left over at last: ((y_BTD, m_BTD), State)."""
    B, T = xs[0].shape[:2]
    whole = T // L * L
    blocks = lambda x: jnp.moveaxis(x[:, :whole].reshape(B, -1, L, *x.shape[2:]), 1, 0)
    state, ys = lax.scan(jax.checkpoint(run, prevent_cse=False), state, jax.tree.map(blocks, xs))
    ys = jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1).reshape(B, whole, *y.shape[3:]), ys)
    if whole < T:
        state, rest = run(state, jax.tree.map(lambda x: x[:, whole:], xs))
        ys = jax.tree.map(lambda y, z: jnp.concatenate([y, z], axis=1), ys, rest)
    return ys, state


def attend(q_BLGR, kv_BL2GY, prefix_NGY, cache_BC2GY, section_BL, place_B):
    """y_BLD: over the prefix, the first `place` of the cache, and the tokens so far, all of the token's own segment."""
    (B, L, G, R), C, N, t_L = q_BLGR.shape, cache_BC2GY.shape[1], len(prefix_NGY), jnp.arange(q_BLGR.shape[1])
    old_BLC = (section_BL == 0)[..., None] & (jnp.arange(C) < place_B[:, None])[:, None]
    new_BLL = (section_BL[..., None] == section_BL[:, None]) & (t_L <= t_L[:, None])
    of_both_BLX = jnp.repeat(jnp.concatenate([old_BLC, new_BLL], axis=-1), 2, axis=-1)
    seen_BLX = jnp.concatenate([jnp.ones((B, L, N), bool), of_both_BLX], axis=-1)
    both_BX2GY = jnp.concatenate([cache_BC2GY.astype(kv_BL2GY.dtype), kv_BL2GY], axis=1)
    prefix_BNGY = jnp.broadcast_to(prefix_NGY, (B, *prefix_NGY.shape))
    kv_BXGY = jnp.concatenate([prefix_BNGY, both_BX2GY.reshape(B, -1, G, 2 * R)], axis=1)
    k_BXGR, v_BXGR = jnp.split(kv_BXGY, 2, axis=-1)
    scores_BGLX = matmul("blgr,bxgr->bglx", q_BLGR, k_BXGR) * R**-0.5
    p_BGLX = jax.nn.softmax(jnp.where(seen_BLX[:, None], scores_BGLX, -jnp.inf))
    y_BLGR = matmul("bglx,bxgr->blgr", p_BGLX.astype(v_BXGR.dtype), v_BXGR)
    return y_BLGR.reshape(B, L, G * R).astype(v_BXGR.dtype)


def newest(kv_BL2GY, cache_BC2GY, count_BL):
    """The cache with these tokens, for the segment that the last of them is of."""
    L, C, last_B1 = count_BL.shape[1], cache_BC2GY.shape[1], count_BL[:, -1:]
    token_BC = jnp.arange(C) - last_B1 + L - 1
    wide = lambda of_BC: of_BC[..., None, None, None]
    new_BC2GY = jnp.take_along_axis(kv_BL2GY, wide(jnp.maximum(token_BC, 0)), axis=1, mode="clip")
    cache_BC2GY = jnp.where(wide(token_BC >= 0), new_BC2GY.astype(cache_BC2GY.dtype), cache_BC2GY)
    return jnp.where(wide(jnp.arange(C) <= last_B1), cache_BC2GY, 0)


def ask(titans, A, W, q_BLHK):
    """What a memory reads that is no further from A_0 than W."""
    network = lambda W, q_LK: mlp(titans.depth, dense(W), q_LK)
    with jax.default_matmul_precision("highest"):
        return jax.vmap(jax.vmap(network, (0, 1), 1))(add(A, W), q_BLHK.astype(A["0"].dtype))


def read(p, r_BLHV):
    """From heads to channels."""
    return project(norm(r_BLHV, p["scale_read"]).reshape(*r_BLHV.shape[:2], -1), p["kernel_read"])


def keys_and_values(p, x_BLD, G, at_BL):
    k_BLGR, v_BLGR = (split(project(x_BLD, p[f"kernel_{name}"]), G) for name in "kv")
    return jnp.concatenate([turn(k_BLGR, at_BL), v_BLGR], axis=-1)


def split(x_BLE, heads):
    return x_BLE.reshape(*x_BLE.shape[:2], heads, x_BLE.shape[-1] // heads)  # also with no tokens


def project(x_BLD, W_DE):
    return matmul("bld,de->ble", x_BLD, W_DE.astype(x_BLD.dtype)).astype(x_BLD.dtype)


def norm(x_BLD, scale_D):
    """As nn.RMSNorm."""
    wide_BLD = x_BLD.astype(jnp.promote_types(x_BLD.dtype, jnp.float32))
    return (wide_BLD * lax.rsqrt(jnp.mean(wide_BLD**2, -1, keepdims=True) + 1e-6) * scale_D).astype(x_BLD.dtype)


class TitansMAC(Titans):
    segment: int = 256

    def layer(self) -> tuple[Any, dict[str, Any]]:
        return Layer, {"segment": self.segment}
