"""Pallas kernels, one file per op and backend. Imports nothing of memzoo, and no Pallas until a kernel is asked for.

A module is named after the op and the chip it is written for: `linear_attention_tpu`, `linear_attention_sm90`,
`delta_rule_tpu`, `delta_rule_sm90`, `linear_scan_tpu`, `linear_scan_sm90`. It has two functions, `support` and the op:

    support(q_BTHK, k_BTHK, v_BTHV, [beta_BTH], log_decay, S_BHKV, device, *, auto=False) -> None | str
    linear_attention(q_BTHK, k_BTHK, v_BTHV, log_decay, S_BHKV, reset_BT, *, interpret=False) -> y_BTHV, S_BHKV
    delta_rule(q_BTHK, k_BTHK, v_BTHV, beta_BTH, log_decay, S_BHKV, reset_BT, *, interpret=False) -> y_BTHV, S_BHKV

    support(a_BTX, x_BTX, h_BX, device, *, auto=False) -> None | str
    linear_scan(a_BTX, x_BTX, h_BX, reset_BT, *, interpret=False) -> h_BTX, h_BX

`kernels/README.md` says what both promise.

Dims: B batch, T time, H heads, K key, V value, X channels.
"""

import contextlib
import contextvars
import importlib
import importlib.util
from collections.abc import Iterator
from types import ModuleType

BACKENDS = ("tpu", "sm90")
_interpreted: contextvars.ContextVar[str | None] = contextvars.ContextVar("interpreted", default=None)


@contextlib.contextmanager
def interpreted(backend: str) -> Iterator[None]:
    """Within it, kernels asked for by name are those of `backend`, 'tpu' or 'sm90', in Pallas' interpreter: for tests.

    Raises ValueError for another name.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    token = _interpreted.set(backend)
    try:
        yield
    finally:
        _interpreted.reset(token)


def backend_interpreted() -> str | None:
    """The backend of the innermost `interpreted`, or None outside of any."""
    return _interpreted.get()


def module(op: str, backend: str) -> ModuleType | None:
    """The kernel module of an op for a backend, or None where there is no such file."""
    name = f"memzoo_kernels.{op}_{backend}"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None
