"""Which form of an op runs where a kernel is one of them: decided from backend, shapes and dtypes, before any lowering.

A kernel compiled for the wrong chip ends the process, so what cannot run is never tried. Pallas itself is imported when
the first kernel is taken, and so never on a CPU, but for `memzoo_kernels.interpreted`.
"""

import os
from typing import Any, NamedTuple

import jax
import memzoo_kernels

from memzoo.contract import nearest
from memzoo.ops.checks import IMPLS, check_impl

VARIABLE = "MEMZOO_IMPL"  # in the environment: what "auto" is, for debugging
BACKENDS = {"tpu": "tpu", "gpu": "sm90"}  # of JAX's platforms


class Choice(NamedTuple):
    """A form, and of 'pallas' whose kernel. Hashable: it is static where it is jitted."""

    impl: str
    backend: str = ""
    interpret: bool = False


def choose(op: str, impl: str, forms: tuple[str, ...], otherwise: str, *arrays: Any) -> Choice:
    """`impl`, checked. 'auto' is the kernel, where it can run and pays, and `otherwise` elsewhere, or for one token.

    forms: all but 'pallas'. arrays: the kernel's own arguments, or their shapes and dtypes.
    Raises ValueError for a name that no op knows, here or in MEMZOO_IMPL; NotImplementedError for a form that the op
    does not have, and for 'pallas' where it cannot run, with the limit exceeded.
    """
    forms = (*forms, "pallas")
    check_impl(op, impl, forms)
    if impl == "auto":
        impl = _override(forms)
    if impl == "auto" and otherwise == "scan":
        impl = otherwise
    if impl not in ("auto", "pallas"):
        return Choice(impl)
    interpreted = memzoo_kernels.backend_interpreted() if impl == "pallas" else None
    device: jax.Device | None = None
    backend = interpreted
    if backend is None:
        device = _device()
        backend = BACKENDS.get(device.platform, "")
    reason = _reason(op, backend, device, arrays, auto=impl == "auto")
    if reason is None:
        return Choice("pallas", backend, interpreted is not None)
    if impl == "auto":
        return Choice(otherwise)
    raise NotImplementedError(f"impl: {op} has no kernel for this call: {reason}; 'auto' would run '{otherwise}'")


def run(op: str, choice: Choice, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The kernel that was chosen."""
    return getattr(memzoo_kernels.module(op, choice.backend), op)(*arrays, interpret=choice.interpret)


def _override(forms):
    impl = os.environ.get(VARIABLE, "auto") or "auto"
    if impl not in ("auto", *IMPLS):
        expected = ", ".join(("auto", *IMPLS))
        raise ValueError(f"{VARIABLE}: expected one of {expected}; got {impl!r}, {nearest(impl, ('auto', *IMPLS))}")
    return impl if impl in forms else "auto"


def _device() -> jax.Device:
    default = jax.config.jax_default_device
    if isinstance(default, jax.Device):
        return default
    return jax.local_devices(backend=default)[0]


def _reason(op, backend, device, arrays, auto):
    if not backend:
        return f"the device is a {device.platform.upper()}, and kernels are for TPUs and Hopper GPUs"
    if auto and jax.device_count() > 1 and not _in_shard_map():
        return "there are many devices, over which XLA cannot divide a kernel"
    module = memzoo_kernels.module(op, backend)
    return module.support(*arrays, device, auto=auto) if module else f"there is no {op} for {backend}"


def _in_shard_map() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return bool(mesh.axis_names) and set(mesh.manual_axes) == set(mesh.axis_names)
