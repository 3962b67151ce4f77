"""Text from a model: one call reads the prompt, then each token is one call with T = 1, in constant memory.

Source: nucleus sampling (top_p) of Holtzman, Buys, Du, Forbes and Choi, "The Curious Case of Neural Text
Degeneration" (2019), arXiv:1904.09751, sec. 3.1; top_k of Fan, Lewis and Dauphin, "Hierarchical Neural Story
Generation" (2018), arXiv:1805.04833, sec. 5.2.

Dims: B batch, T time, S generated tokens, Z vocabulary.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memzoo import contract
from memzoo.models.backbone import check_tokens


class Generation(NamedTuple):
    """What came out, and where to go on.

    tokens_BS: the new tokens; after a row's stop token, stop tokens. lengths_B: how many of them are the row's own,
    its stop token included. state: has seen the prompt and all of a row's own tokens but the last.
    """

    tokens_BS: jax.Array
    lengths_B: jax.Array
    state: Any

    @property
    def last_B1(self) -> jax.Array:
        """The token that the state has not seen: with `state`, the prompt that goes on where this left off."""
        return jnp.take_along_axis(self.tokens_BS, self.lengths_B[:, None] - 1, axis=1)


def generate(
    model: Any,
    params: Any,
    prompt_BT: jax.Array,
    steps: int,
    key: jax.Array,
    temperature: float | jax.Array = 1.0,
    top_k: int | None = None,
    top_p: float | jax.Array | None = None,
    *,
    stop: int | None = None,
    state: Any = None,
    reset_BT: jax.Array | None = None,
) -> Generation:
    """Continues each row of the prompt by `steps` tokens, or fewer where it ends with `stop`.

    temperature: 0 takes the likeliest token; 1 samples what the model says. top_k: only from the k likeliest.
    top_p: only from the smallest set of likeliest tokens that holds this much probability, after top_k.
    stop: a row that says this token has ended; when all have, nothing more is computed.
    state: of an earlier call, which may be used again; reset_BT: as in the model's call. Prompts of different length
    go through `left_pad`.

    Compiled once for each model, prompt shape, `steps`, `top_k` and `stop`; not for another key, temperature or top_p.
    Raises ValueError, by name, for settings out of their range and tokens outside the vocabulary. Not differentiable.
    """
    check_tokens("prompt_BT", prompt_BT, model.vocab)
    contract.positive(steps=steps)
    check_settings(model.vocab, temperature, top_k, top_p, stop)
    prompt_BT, temperature = jnp.asarray(prompt_BT, jnp.int32), jnp.asarray(temperature, jnp.float32)
    top_p = None if top_p is None else jnp.asarray(top_p, jnp.float32)
    # Decoding overwrites its state. What prefill returns unchanged is the caller's own array, so it gets a copy.
    state = jax.tree.map(jnp.copy, state)
    logits_BZ, state = prefill(model, params, prompt_BT, state, reset_BT)
    return decode(model, params, logits_BZ, state, key, temperature, top_p, steps=steps, top_k=top_k, stop=stop)


@partial(jax.jit, static_argnames="model")
def prefill(model, params, prompt_BT, state, reset_BT):
    logits_BTZ, state = model.apply(params, prompt_BT, state, reset_BT)
    return logits_BTZ[:, -1], state


@partial(jax.jit, static_argnames=("model", "steps", "top_k", "stop"), donate_argnames="state")
def decode(model, params, logits_BZ, state, key, temperature, top_p, *, steps, top_k, stop):
    pick = partial(choose, temperature=temperature, top_k=top_k, top_p=top_p)
    first_B = pick(logits_BZ, jax.random.fold_in(key, 0))
    B = first_B.shape[0]

    def unfinished(carry):
        t, _, _, ended_B, _ = carry
        return (t < steps) & ~jnp.all(ended_B)

    def token(carry):
        t, tokens_BS, last_B, ended_B, state = carry
        logits_B1Z, after = model.apply(params, last_B[:, None], state)
        last_B = pick(logits_B1Z[:, 0], jax.random.fold_in(key, t))
        if stop is not None:
            last_B = jnp.where(ended_B, stop, last_B)
            after = jax.tree.map(lambda new, old: jax.vmap(jnp.where)(ended_B, old, new), after, state)
            ended_B |= last_B == stop
        return t + 1, tokens_BS.at[:, t].set(last_B), last_B, ended_B, after

    tokens_BS = jnp.full((B, steps), 0 if stop is None else stop, jnp.int32).at[:, 0].set(first_B)
    ended_B = jnp.zeros(B, bool) if stop is None else first_B == stop
    _, tokens_BS, _, _, state = lax.while_loop(unfinished, token, (1, tokens_BS, first_B, ended_B, state))

    lengths_B = jnp.full(B, steps, jnp.int32)
    if stop is not None:
        stopped_BS = tokens_BS == stop
        lengths_B = jnp.where(stopped_BS.any(1), stopped_BS.argmax(1).astype(jnp.int32) + 1, lengths_B)
    return Generation(tokens_BS, lengths_B, state)


def choose(logits_BZ, key, temperature=1.0, top_k=None, top_p=None) -> jax.Array:
    """One token for each row, in int32. The arguments are those of `generate`; a tie goes to the smaller token."""
    greedy_B = jnp.argmax(logits_BZ, axis=-1)
    logits_BZ = logits_BZ.astype(jnp.float32)
    # The largest becomes 0 first, so that a small temperature cannot make it infinite.
    logits_BZ = (logits_BZ - logits_BZ.max(-1, keepdims=True)) / jnp.where(temperature > 0, temperature, 1)
    if top_k is None and top_p is None:
        token_B = jax.random.categorical(key, logits_BZ)
    else:
        order_BZ = jnp.argsort(logits_BZ, axis=-1, stable=True, descending=True)
        sorted_BZ = jnp.take_along_axis(logits_BZ, order_BZ, axis=-1)
        if top_k is not None:
            sorted_BZ = jnp.where(jnp.arange(sorted_BZ.shape[-1]) < top_k, sorted_BZ, -jnp.inf)
        if top_p is not None:
            # A token stays when those before it hold less than top_p: the first always does. Rounding must not
            # cut the tail at top_p = 1.
            p_BZ = jax.nn.softmax(sorted_BZ)
            before_BZ = jnp.cumsum(p_BZ, axis=-1)[:, :-1]
            before_BZ = jnp.pad(before_BZ, ((0, 0), (1, 0)))
            sorted_BZ = jnp.where((before_BZ < top_p) | (top_p >= 1), sorted_BZ, -jnp.inf)
        rank_B = jax.random.categorical(key, sorted_BZ)
        token_B = jnp.take_along_axis(order_BZ, rank_B[:, None], axis=-1)[:, 0]
    return jnp.where(temperature > 0, token_B, greedy_B).astype(jnp.int32)


def left_pad(prompts: Sequence[Sequence[int]]) -> tuple[jax.Array, jax.Array]:
    """Prompts of different length -> (tokens_BT, reset_BT), padded on the left with token 0.

    The reset at a prompt's first token makes the padding, and any state before it, as if it had never been.
    """
    T = max((len(prompt) for prompt in prompts), default=0)
    if T == 0 or not all(len(prompt) for prompt in prompts):
        lengths = [len(prompt) for prompt in prompts]
        raise ValueError(f"prompts: expected at least one, and a token in each, got lengths {lengths}")
    tokens_BT, reset_BT = np.zeros((len(prompts), T), np.int32), np.zeros((len(prompts), T), bool)
    for b, prompt in enumerate(prompts):
        if not np.issubdtype(np.asarray(prompt).dtype, np.integer):
            raise ValueError(f"prompts[{b}]: expected integers, got {np.asarray(prompt).dtype}")
        tokens_BT[b, T - len(prompt) :] = prompt
        reset_BT[b, T - len(prompt)] = True
    return jnp.asarray(tokens_BT), jnp.asarray(reset_BT)


def check_settings(vocab, temperature, top_k, top_p, stop) -> None:
    """Raises ValueError, by name, for a setting out of its range; a value inside `jit` is not looked at."""
    if not isinstance(temperature, jax.core.Tracer) and not 0 <= temperature < np.inf:
        raise ValueError(f"temperature: expected a number >= 0, got {temperature}")
    if top_k is not None and not 1 <= top_k <= vocab:
        raise ValueError(f"top_k: expected 1 ... vocab = {vocab}, got {top_k}")
    if top_p is not None and not isinstance(top_p, jax.core.Tracer) and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p}")
    if stop is not None and not 0 <= stop < vocab:
        raise ValueError(f"stop: expected a token in 0 ... vocab - 1 = {vocab - 1}, got {stop}")
