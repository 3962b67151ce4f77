"""What the chunked forms keep: never a state per token, and for training little more than inputs and outputs."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

import memzoo
from memzoo import ops

B, H, K, V = 2, 3, 32, 24
BYTES = 4


def arguments(op, per_key, T):
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    qkv = shape(B, T, H, K), shape(B, T, H, K), shape(B, T, H, V)
    beta = () if op is ops.linear_attention else (shape(B, T, H),)
    return *qkv, *beta, shape(B, T, H, K) if per_key else shape(B, T, H), shape(B, H, K, V)


def gradient(op):
    def loss(*args):
        y, S = op(*args, impl="chunk")
        return jnp.sum(y**2) + jnp.sum(S**2)

    return lambda *args: jax.grad(loss, argnums=tuple(range(len(args))))(*args)


@pytest.mark.long
@pytest.mark.parametrize("per_key", (False, True), ids=("per_head", "per_key"))
@pytest.mark.parametrize("op", (ops.linear_attention, ops.delta_rule), ids=("linear_attention", "delta_rule"))
def test_no_state_per_token_and_linear_growth(op, per_key):
    temporary = {}
    for T in (512, 1024):
        compiled = jax.jit(gradient(op)).lower(*arguments(op, per_key, T)).compile()
        shapes = re.findall(r"(?:f32|f64)\[([\d,]+)\]", compiled.as_text())
        largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
        assert largest < B * T * H * K * V / 4, "a tensor near the size of a state per token"
        temporary[T] = compiled.memory_analysis().temp_size_in_bytes
        assert temporary[T] < BYTES * B * T * H * K * V
    assert temporary[1024] <= 2.05 * temporary[512]


@pytest.mark.parametrize("per_key", (False, True), ids=("per_head", "per_key"))
def test_what_the_gradient_saves(per_key):
    """Linear attention: its inputs and two states. The delta rule: its inputs, a state and an inverse per chunk."""
    T = 1024
    for op, states, inverses in ((ops.linear_attention, 2, 0), (ops.delta_rule, T // 64, T // 64)):
        args = arguments(op, per_key, T)
        saved = jax.eval_shape(lambda *a, op=op: jax.vjp(lambda *a: op(*a, impl="chunk"), *a)[1], *args)
        bytes_of = lambda tree: sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        state = BYTES * B * H * K * V
        masks = B * T + state // BYTES  # resets, and where the first of them cuts the incoming state
        assert bytes_of(saved) <= bytes_of(args) + masks + states * state + inverses * BYTES * B * H * 64**2


def test_the_test_sees_a_state_per_token():
    compiled = jax.jit(lambda *a: ops.linear_attention(*a, impl="associative")).lower(
        *arguments(ops.linear_attention, False, 512)
    )
    shapes = re.findall(r"f32\[([\d,]+)\]", compiled.compile().as_text())
    assert max(math.prod(map(int, shape.split(","))) for shape in shapes) >= B * 512 * H * K * V


@pytest.mark.long
@pytest.mark.parametrize("name", [n for n in memzoo.names() if memzoo.card(n).state == "constant"])
def test_state_does_not_depend_on_time(name):
    mixer = memzoo.make(name, width=32)
    leaves = {}
    for T in (1, 64, 4096):
        x = jax.ShapeDtypeStruct((2, T, 32), jnp.float32)
        _, state = jax.eval_shape(lambda x: mixer.init_with_output(jax.random.key(0), x)[0], x)
        leaves[T] = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)]
    assert leaves[1] == leaves[64] == leaves[4096]
    assert leaves[1] == [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(mixer.initial_state(2))]
