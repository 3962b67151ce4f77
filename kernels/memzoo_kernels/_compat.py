"""What Pallas names differently in jax 0.11.2 and in the newest jax."""

import inspect
from typing import Any

import jax


def load(ref: Any, layout: Any, **options: Any) -> jax.Array:
    """plgpu.load(ref, layout=layout), for which some releases want an index too."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    index = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()
    return plgpu.load(ref, *index, layout=layout, **options)
