"""Data parallel over all devices: every device holds the state and works on its rows of the batch.

A step is written once, as step(state, batch, axis) -> (state, metrics). `axis` is the name to average over with
`lax.pmean` where each device sees its own rows only, and None where it sees all rows.

    jit     arrays are global, sharded over a mesh; the compiler finds the collectives. The default.
    pmap    one program per device on a replicated state; the collectives are the step's own.

Both give the losses of one device, up to float32 rounding. The batch is the batch of all devices and processes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from memzoo.contract import nearest

AXIS = "data"


class Strategy(NamedTuple):
    put_state: Callable[[Any], Any]  # one copy of the state -> the state on all devices
    put_batch: Callable[[Any], Any]  # this process's rows, a pytree of numpy arrays -> the batch on all devices
    compile_step: Callable[[Callable], Callable]  # step -> (state, batch) -> (state, metrics); the state is donated
    compile_eval: Callable[[Callable], Callable]  # fn(state, batch, axis) -> sums over rows; nothing is donated
    one: Callable[[Any], Any]  # the state on all devices -> one copy, to save it or to sample from it


def make(name: str, batch: int, devices: list[jax.Device] | None = None) -> Strategy:
    """'jit' or 'pmap' over `devices` (all of them by default). Raises ValueError for another name, or for a batch that
    the devices do not divide."""
    strategies = {"jit": jit, "pmap": pmap}
    if name not in strategies:
        raise ValueError(f"strategy: expected 'jit' or 'pmap', got {name!r}; {nearest(name, strategies)}")
    devices = jax.devices() if devices is None else devices
    if batch < 1 or batch % len(devices):
        raise ValueError(f"batch: expected a positive multiple of the {len(devices)} devices, got {batch}")
    return strategies[name](devices)


def jit(devices: list[jax.Device]) -> Strategy:
    mesh = Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))
    everywhere, by_rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(AXIS))
    shardings: dict[str, Any] = {"in_shardings": (everywhere, by_rows), "out_shardings": everywhere}

    def put_batch(batch):
        return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(by_rows, rows), batch)

    return Strategy(
        put_state=lambda state: jax.device_put(state, everywhere),
        put_batch=put_batch,
        compile_step=lambda step: jax.jit(partial(step, axis=None), donate_argnums=0, **shardings),
        compile_eval=lambda fn: jax.jit(partial(fn, axis=None), **shardings),
        one=lambda state: state,
    )


def pmap(devices: list[jax.Device]) -> Strategy:
    local = [device for device in devices if device.process_index == jax.process_index()]
    n = len(local)
    by_device = NamedSharding(Mesh(np.array(local), (AXIS,), axis_types=(AxisType.Auto,)), PartitionSpec(AXIS))

    def put_state(state):
        return jax.tree.map(lambda x: jax.device_put(np.broadcast_to(x, (n, *np.shape(x))), by_device), state)

    def put_batch(batch):
        split = jax.tree.map(lambda rows: rows.reshape(n, len(rows) // n, *rows.shape[1:]), batch)
        return jax.device_put(split, by_device)

    def compile_step(step):
        mapped = jax.pmap(partial(step, axis=AXIS), AXIS, devices=devices, donate_argnums=0)

        def call(state, batch):
            state, metrics = mapped(state, batch)
            return state, first(metrics)

        return call

    def compile_eval(fn):
        mapped = jax.pmap(partial(fn, axis=AXIS), AXIS, devices=devices)
        return lambda state, batch: first(mapped(state, batch))

    return Strategy(put_state, put_batch, compile_step, compile_eval, one=first)


def first(replicated):
    """The first device's copy, without a gather."""
    return jax.tree.map(lambda x: x.addressable_shards[0].data[0], replicated)
