"""What every mixer checks before it computes: the input, the state and the resets it was given.

Dims: B batch, T time, D width.
"""

import dataclasses
import difflib
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict


def state_dtype(dtype: Any) -> jnp.dtype:
    """The dtype of state, gates, decays and sums for a compute dtype: float32, or float64 when `dtype` is."""
    return jnp.promote_types(dtype, jnp.float32)


def begin(mixer: Any, x_BTD: jax.Array, state: Any, reset_BT: jax.Array | None) -> Any:
    """Checks the arguments of a mixer's call and returns the state to begin with.

    Raises ValueError, naming the argument, what was expected and what came.
    """
    check_numbers(mixer)
    check_input(x_BTD, mixer.width)
    B, T, _ = x_BTD.shape
    check_reset(reset_BT, B, T)
    if state is None:
        return mixer.initial_state(B)
    check_state(state, jax.eval_shape(lambda: mixer.initial_state(B)))
    return state


def check_input(x_BTD: jax.Array, width: int) -> None:
    if np.ndim(x_BTD) != 3 or np.shape(x_BTD)[-1] != width or np.shape(x_BTD)[1] == 0:
        raise ValueError(f"x_BTD: expected shape [B, T >= 1, D = {width}], got {list(np.shape(x_BTD))}")
    if np.shape(x_BTD)[0] == 0:
        raise ValueError(f"x_BTD: expected B >= 1, got shape {list(np.shape(x_BTD))}")
    check_array("x_BTD", x_BTD)
    if not jnp.issubdtype(x_BTD.dtype, jnp.floating):
        raise ValueError(f"x_BTD: expected a floating dtype, got {x_BTD.dtype}")


def frozen(fields: Any) -> FrozenDict:
    """Fields of a mixer, lists and arrays as tuples: hashable, so that their model is a static argument of jit."""

    def hashable(value):
        if isinstance(value, np.ndarray | jax.Array):
            value = np.asarray(value).tolist()
        if type(value) in (list, tuple):
            return tuple(map(hashable, value))
        return frozen(value) if isinstance(value, Mapping) else value

    return FrozenDict({name: hashable(value) for name, value in fields.items()})


def check_array(name: str, x: Any) -> None:
    if not hasattr(x, "dtype"):
        raise ValueError(f"{name}: expected an array, got {describe(x)}")


def check_reset(reset_BT: jax.Array | None, B: int, T: int) -> None:
    if reset_BT is None:
        return
    if np.shape(reset_BT) != (B, T):
        raise ValueError(f"reset_BT: expected shape [B = {B}, T = {T}], got {list(np.shape(reset_BT))}")
    check_array("reset_BT", reset_BT)
    if reset_BT.dtype != jnp.bool_:
        raise ValueError(f"reset_BT: expected dtype bool, got {reset_BT.dtype}")


def check_state(state: Any, expected: Any, whose: str = "state") -> None:
    """Compares a state with the shapes and dtypes of `expected`, leaf by leaf. `whose` names it in the errors."""
    if jax.tree.structure(state) != jax.tree.structure(expected):  # type: ignore[operator]
        raise ValueError(f"{whose}: expected {describe(expected)}, got {describe(state)}")
    for (path, want), got in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(state), strict=True):
        name = f"{whose}{jax.tree_util.keystr(path)}"
        if np.shape(got) != want.shape:
            raise ValueError(f"{name}: expected shape {list(want.shape)}, got {list(np.shape(got))}")
        if jnp.result_type(got) != want.dtype:
            raise ValueError(f"{name}: expected dtype {want.dtype}, got {jnp.result_type(got)}")


def describe(state: Any) -> str:
    kind = type(state)
    if kind.__module__ == "builtins":
        return str(jax.tree.structure(state)) if isinstance(state, tuple | list | dict) else kind.__name__
    return f"{kind.__module__}.{kind.__qualname__}"


def add_loss(module: Any, name: str, value: jax.Array) -> None:
    """Sows a term that training is to make small too, weighted as it is to be added, into the collection "losses"."""
    if not module.is_initializing():  # or `init` would give it back among the parameters
        module.sow("losses", name, value)


def divisible(name: str, value: int, by_name: str, by: int) -> int:
    """value // by, or a ValueError that says which field does not divide which."""
    positive(**{by_name: by})
    if not whole_number(value) or value < 1 or value % by:
        raise ValueError(f"{name}: expected a positive multiple of {by_name} = {by}, got {value}")
    return value // by


def positive(**fields: int) -> None:
    for name, value in fields.items():
        if not whole_number(value) or value < 1:
            raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")


def check_numbers(mixer: Any) -> None:
    """Raises ValueError for a field that is a float by default, and is not a finite number; and so for bools."""
    for field in dataclasses.fields(mixer):
        value = getattr(mixer, field.name)
        if isinstance(field.default, float) and (not isinstance(value, numbers.Real) or not math.isfinite(value)):
            raise ValueError(f"{field.name}: expected a finite number, got {value!r}")
        if isinstance(field.default, bool) and not isinstance(value, bool | np.bool_):
            raise ValueError(f"{field.name}: expected True or False, got {value!r}")


def whole_number(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def nearest(name: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' with the closest of `known`, or the whole list when nothing is close."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {', '.join(close)}?" if close else f"there are {', '.join(known)}"
