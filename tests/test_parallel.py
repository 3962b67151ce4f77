"""Eight devices give what one gives, up to rounding. Run as a script, this file compares them and prints the losses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memzoo import parallel, train

ROOT = Path(__file__).parents[1]
BATCH, WIDTH = 16, 6


def run(strategy, devices):
    """Some steps of a small regression: the losses, the sum over held-out rows, and the parameters at the end."""
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(WIDTH, WIDTH)).astype(np.float32), "bias": np.zeros(WIDTH, np.float32)}

    def errors(params, batch):
        x_BD, y_BD = batch
        return jnp.mean((jnp.tanh(x_BD @ params["kernel"] + params["bias"]) - y_BD) ** 2, axis=-1)

    def loss(params, batch, key):
        return jnp.mean(errors(params, batch))

    def total(params, batch, axis):
        value = jnp.sum(errors(params, batch))
        return value if axis is None else jax.lax.psum(value, axis)

    optimizer = train.adamw(0.03, steps=20)
    spread = parallel.make(strategy, BATCH, devices)
    step, evaluate = spread.compile_step(train.make_step(loss, optimizer)), spread.compile_eval(total)
    state = spread.put_state(train.create(params, optimizer, jax.random.key(0)))
    seen = []
    for _ in range(20):
        rows = rng.normal(size=(2, BATCH, WIDTH)).astype(np.float32)
        state, metrics = step(state, spread.put_batch((rows[0], rows[1])))
        seen += [float(metrics["loss"]), float(metrics["grad_norm"])]
    seen.append(float(evaluate(state.params, spread.put_batch((rows[0], rows[1])))))
    one = spread.one(state)
    assert int(one.step) == 20 and one.params["kernel"].shape == (WIDTH, WIDTH)
    copies = [np.asarray(shard.data).ravel() for shard in state.params["kernel"].addressable_shards]
    assert len(copies) == len(devices) and all((copy == copies[0]).all() for copy in copies)
    assert (one.params["kernel"] == copies[0].reshape(WIDTH, WIDTH)).all()
    return seen + copies[0].tolist()


def test_eight_devices_give_the_losses_of_one():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    paths = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
    done = subprocess.run([sys.executable, __file__], env=os.environ | flags | paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["devices"] == 8
    for strategy in ("jit", "pmap"):
        np.testing.assert_allclose(result[strategy], result["one"], rtol=2e-5, atol=1e-6)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="strategy: expected 'jit' or 'pmap', got 'pmapp'; did you mean pmap"):
        parallel.make("pmapp", 4)
    device = jax.devices()[0]
    for batch in (0, 12):
        with pytest.raises(ValueError, match=f"batch: expected a positive multiple of the 8 devices, got {batch}"):
            parallel.make("jit", batch, [device] * 8)


if __name__ == "__main__":
    every = jax.devices()
    results = {"one": run("jit", every[:1]), "jit": run("jit", every), "pmap": run("pmap", every)}
    print(json.dumps(results | {"devices": len(every)}))
