"""Clear errors for the arguments of ops: what was expected, and what came.

Dims: single capitals, as in the names of the arguments; a capital stands for one size throughout a call.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from memzoo.contract import nearest

IMPLS = ("scan", "sweep", "associative", "chunk", "conv", "newton", "pallas")


def check_impl(op: str, impl: str, forms: tuple[str, ...]) -> None:
    """Raises ValueError for a name that no op knows, NotImplementedError for a form that this op does not have."""
    if impl == "auto" or impl in forms:
        return
    if impl not in IMPLS:
        expected = ", ".join(("auto", *forms))
        raise ValueError(f"impl: expected one of {expected}; got {impl!r}, {nearest(str(impl), ('auto', *IMPLS))}")
    raise NotImplementedError(f"impl: {op} has no form {impl!r}; it has {', '.join(forms)}")


def check_shapes(may_be_empty: str = "", **arrays: Any) -> dict[str, int]:
    """Checks each array against the suffix of its name (q_BTHK has axes B, T, H, K) and returns the sizes.

    None is skipped; only the axes of `may_be_empty` may have size 0. Raises ValueError for a wrong rank, for two sizes
    of one letter, for a size 0, for a dtype that is neither floating nor complex (bool for reset_BT).
    """
    sizes: dict[str, int] = {}
    first: dict[str, str] = {}
    for name, array in arrays.items():
        if array is None:
            continue
        axes = name.rsplit("_", 1)[1]
        shape = np.shape(array)
        if len(shape) != len(axes):
            raise ValueError(f"{name}: expected {len(axes)} axes [{', '.join(axes)}], got shape {list(shape)}")
        for axis, size in zip(axes, shape, strict=True):
            if size == 0 and axis not in may_be_empty:
                raise ValueError(f"{name}: expected {axis} >= 1, got shape {list(shape)}")
            if sizes.setdefault(axis, size) != size:
                as_in = f"{axis} = {sizes[axis]} as in {first[axis]}"
                raise ValueError(f"{name}: expected {as_in}, got shape {list(shape)}")
            first.setdefault(axis, name)
        dtype = jnp.result_type(array)
        if name.startswith("reset"):
            if dtype != jnp.bool_:
                raise ValueError(f"{name}: expected dtype bool, got {dtype}")
        elif not jnp.issubdtype(dtype, jnp.inexact):
            raise ValueError(f"{name}: expected a floating dtype, got {dtype}")
    return sizes


def check_log_decay(q_BTHK, log_decay):
    """The log-decay as [B, T, H] or [B, T, H, K], zeros for None, in float32 or wider."""
    wide = jnp.promote_types(jnp.result_type(q_BTHK), jnp.float32)
    if log_decay is None:
        return jnp.zeros(q_BTHK.shape[:3], wide)
    name = "log_decay_BTHK" if jnp.ndim(log_decay) == 4 else "log_decay_BTH"
    check_shapes(q_BTHK=q_BTHK, **{name: log_decay})
    return jnp.asarray(log_decay, wide)


def dtypes(q_BTHK: Any, k_BTHK: Any, v_BTHV: Any, S_BHKV: Any) -> tuple[jnp.dtype, jnp.dtype]:
    """(of products, of the state and sums): the inputs' common one, and that in float32 at least.

    A state in float64 makes both float64.
    """
    common = jnp.result_type(q_BTHK, k_BTHK, v_BTHV)
    wide = jnp.promote_types(common, jnp.float32)
    given = wide if S_BHKV is None else jnp.promote_types(jnp.result_type(S_BHKV), wide)
    return (common, wide) if given == wide else (given, given)
