"""Training: the state, the optimiser, a step that skips an update that is not finite, and the guard that then stops.

A loss is loss(params, batch, key) -> scalar, the mean over the rows of the batch.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class TrainState(NamedTuple):
    """All that an update reads and writes: what a checkpoint has to hold, with the position in the data."""

    step: jax.Array  # int32, the updates made
    params: Any
    opt_state: Any
    key: jax.Array  # uint32, the data of a random key; one half of it is used up by each step


class NonFiniteError(FloatingPointError):
    """Training stopped: a loss or a gradient was not finite."""


def adamw(
    learning_rate: float, steps: int, warmup: int = 100, weight_decay: float = 0.1, clip: float = 1.0, end: float = 0.01
) -> optax.GradientTransformation:
    """AdamW with betas (0.9, 0.99), after clipping the gradient's global norm to `clip`.

    The rate rises linearly for `warmup` steps (at most a tenth of all), then falls as a cosine to `end` of its peak.
    Only matrices that multiply activations decay: leaves named kernel, embedding or head.
    """
    if not learning_rate > 0 or not math.isfinite(learning_rate):
        raise ValueError(f"learning_rate: expected a finite number > 0, got {learning_rate}")
    if steps < 1:
        raise ValueError(f"steps: expected an integer >= 1, got {steps}")
    if warmup < 0:
        raise ValueError(f"warmup: expected an integer >= 0, got {warmup}")
    warmup = min(warmup, steps // 10)
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, steps, end * learning_rate)
    # The count is that of updates already made, so a schedule from 0 would waste the first.
    optimizer = optax.adamw(lambda count: rate(count + 1), b1=0.9, b2=0.99, weight_decay=weight_decay, mask=decays)
    return optax.chain(optax.clip_by_global_norm(clip), optimizer)


def decays(params: Any) -> Any:
    """True for the leaves that weight decay is for."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: str(getattr(path[-1], "key", "")).startswith(("kernel", "embedding", "head")), params
    )


def create(params: Any, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    return TrainState(jnp.int32(0), params, optimizer.init(params), jax.random.key_data(key))


def make_step(loss: Callable, optimizer: optax.GradientTransformation) -> Callable:
    """step(state, batch, axis) -> (state, metrics), for `parallel` to compile.

    metrics: `loss`, and `grad_norm` before clipping. Where one of them is not finite, the parameters and the optimiser
    stay as they were.
    """

    def step(state: TrainState, batch: Any, axis: str | None = None) -> tuple[TrainState, dict[str, jax.Array]]:
        key, now = jax.random.split(jax.random.wrap_key_data(state.key))
        if axis is not None:
            now = jax.random.fold_in(now, jax.lax.axis_index(axis))
        value, grads = jax.value_and_grad(loss)(state.params, batch, now)
        if axis is not None:
            value, grads = jax.lax.pmean((value, grads), axis)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new = optax.apply_updates(state.params, updates), opt_state
        params, opt_state = jax.tree.map(
            lambda after, before: jnp.where(finite, after, before), new, (state.params, state.opt_state)
        )
        state = TrainState(state.step + 1, params, opt_state, jax.random.key_data(key))
        return state, {"loss": value, "grad_norm": grad_norm}

    return step


def guard(step: int, metrics: Mapping[str, Any], last_good: Callable[[], str]) -> dict[str, float]:
    """The metrics of a step as numbers, known to be finite.

    last_good: says where the last good checkpoint is. Raises NonFiniteError, which names it and the step.
    """
    values = {name: float(value) for name, value in metrics.items()}
    bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise NonFiniteError(f"step {step}: {', '.join(bad)}; the last good checkpoint is {last_good()}")
    return values


def cross_entropy(logits_BTZ: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Nats per token, [B, T]. Logits are float32 or wider."""
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTZ, targets_BT.astype(jnp.int32))
