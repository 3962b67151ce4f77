"""Do the tests notice? Forty faults, each put into a copy of the sources, and which test finds it.

    python tests/mutations.py           # the default tests of the architecture at fault
    python tests/mutations.py --long    # those and the long ones

For each fault pytest runs, up to the first failure, the contract of one architecture, that architecture's own tests and
those of the op at fault. One line is printed for each; the exit status is 1 if a fault is not found. A fault whose text
is no longer in the sources, exactly once, is an error: it has to go with them. On 2 CPU cores, two at a time, the
default tests take about 10 minutes. This is no part of the test suite.
"""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import tyro

ROOT = Path(__file__).parents[1]


class Fault(NamedTuple):
    what: str
    architecture: str
    file: str
    old: str
    new: str
    ops: str = ""  # names of test files in tests/ops or tests/kernels


MATRIX = "test_matrix_ops"
FAULTS = (
    # Resets
    Fault("a reset multiplies, in the definition", "deltanet", "memzoo/ops/recur.py",
          "jnp.where(reset, jnp.zeros_like(s), s)", "s * (1 - reset).astype(s.dtype)", MATRIX),
    Fault("a reset multiplies, in memories' definition", "titans", "memzoo/ops/memorize.py",
          "jnp.where(reset, jnp.zeros_like(s), s)", "s * (1 - reset).astype(s.dtype)", "test_memorize"),
    Fault("a reset multiplies, at the first token of the chunk form", "gla", "memzoo/ops/linear_attention.py",
          "jnp.where(reset_BT[:, :1, None, None], 0, s), (S_BHKV, z_BHK1)",
          "s * ~reset_BT[:, :1, None, None], (S_BHKV, z_BHK1)", MATRIX),
    Fault("a reset multiplies, in the elementwise recurrence", "min_gru", "memzoo/ops/linear_scan.py",
          "jnp.where(a == 0, 0, a * h)", "a * h", "test_linear_scan"),
    Fault("a reset leaves the convolution's tail", "mamba", "memzoo/ops/short_conv.py",
          "jnp.where((of_BL[:, T:] == of_BT[:, -1:])[..., None], seen_BLX[:, T:], 0)", "seen_BLX[:, T:]", MATRIX),
    Fault("a reset leaves positions as they are", "retnet", "memzoo/ops/rotary.py",
          "jnp.where(start_BT >= 0, t_T - start_BT, n_B[:, None] + t_T)", "n_B[:, None] + t_T", "test_rotary"),
    Fault("chunks of the text count from the call", "rat", "memzoo/mixers/rat.py",
          "begins_BT = (jnp.arange(T) - start_BT) % L == 0",
          "begins_BT = jnp.broadcast_to(jnp.arange(T) % L == 0, (B, T))"),
    Fault("notes of another sequence are read", "mem_mamba", "memzoo/mixers/mem_mamba.py",
          "is_note_L & (of_L == of) & (order_L", "is_note_L & (order_L"),
    Fault("NaN in the state reaches the gradient past a reset", "s4d", "memzoo/ops/diagonal_ssm.py",
          "    before_BMDN = jnp.where(reset_BMC[..., :1, None], 0, before_BMDN)\n", "", "test_diagonal_ssm"),
    # States
    Fault("the convolution's tail is dropped", "gated_deltanet", "memzoo/ops/short_conv.py",
          "return y_BTX.astype(x_BTX.dtype), past_BPX", "return y_BTX.astype(x_BTX.dtype), 0 * past_BPX", MATRIX),
    Fault("the convolution's tail is the old one, without resets", "gated_deltanet", "memzoo/ops/short_conv.py",
          "return y_BTX.astype(x_BTX.dtype), seen_BLX[:, T:]",
          "return y_BTX.astype(x_BTX.dtype), seen_BLX[:, :P]", MATRIX),
    Fault("the incoming state is ignored at T = 1", "gla", "memzoo/ops/linear_attention.py",
          "S_BHKV = jnp.zeros((B, H, K, v_BTHV.shape[-1]), wide) if S_BHKV is None else",
          "S_BHKV = jnp.zeros((B, H, K, v_BTHV.shape[-1]), wide) if S_BHKV is None or T == 1 else", MATRIX),
    Fault("the incoming state is ignored in the last state", "s4", "memzoo/ops/time_invariant.py",
          "return free_BTH, free_BHN + forced_BHN", "return free_BTH, forced_BHN", "test_time_invariant"),
    Fault("a position counter that is one behind", "retnet", "memzoo/mixers/retnet.py",
          "n_BT[:, -1] + 1", "n_BT[:, -1]"),
    Fault("a position in its chunk that is one behind", "ttt_linear", "memzoo/ops/memory_chunk.py",
          "(places(state.place_B, T, reset_BT)[:, -1] + 1) % C", "places(state.place_B, T, reset_BT)[:, -1] % C",
          "test_memorize"),
    Fault("padding that writes, in front", "deltanet", "memzoo/ops/chunks.py",
          "x = jnp.pad(x_BTX, [(0, 0), (N * C - T, 0)] + [(0, 0)] * (x_BTX.ndim - 2))",
          'x = jnp.pad(x_BTX, [(0, 0), (N * C - T, 0)] + [(0, 0)] * (x_BTX.ndim - 2), mode="edge")', MATRIX),
    Fault("padding that writes, behind", "mamba", "memzoo/ops/selective_scan.py",
          "x = jnp.pad(x, [(0, -len(x) % C)] + [(0, 0)] * (x.ndim - 1))",
          'x = jnp.pad(x, [(0, -len(x) % C)] + [(0, 0)] * (x.ndim - 1), mode="edge")', "test_selective_scan"),
    Fault("a row reads its neighbour's chunks", "gla", "memzoo/ops/chunks.py",
          "by_chunk = lambda x: jnp.moveaxis(x.reshape(B, -1, *x.shape[1:]), 1, 0)",
          "by_chunk = lambda x: x.reshape(-1, B, *x.shape[1:])", MATRIX),
    Fault("a row reads its neighbour's cache", "attention", "memzoo/ops/window_attention.py",
          "past_BWGE = take(cache_BMGE,", "past_BWGE = take(cache_BMGE[::-1],", "test_window_attention"),
    Fault("the state is in the dtype of the computation", "linear_attention", "memzoo/contract.py",
          "return jnp.promote_types(dtype, jnp.float32)", "return jnp.dtype(dtype)", MATRIX),
    Fault("chunks accumulate in the inputs' dtype", "linear_attention", "memzoo/ops/chunks.py",
          "preferred_element_type=wide)", "preferred_element_type=jnp.result_type(*operands))", MATRIX),
    # Recurrences
    Fault("the write decays with the memory", "gla", "memzoo/mixers/gla.py",
          "jnp.exp(log_alpha_K)[:, None] * S_KV + jnp.outer(k_K, v_V)",
          "jnp.exp(log_alpha_K)[:, None] * (S_KV + jnp.outer(k_K, v_V))"),
    Fault("decay to the end of the chunk, off by one token", "mamba2", "memzoo/ops/chunks.py",
          "self.between(slice(-1, None), slice(None)).at", "self.between(slice(-2, -1), slice(None)).at", MATRIX),
    Fault("decay from the start of the chunk, off by one token", "rwkv7", "memzoo/ops/dplr_delta_rule.py",
          "_earlier(from_start, 1)", "from_start", "test_dplr_delta_rule"),
    Fault("the erase acts on the axis of values", "deltanet", "memzoo/mixers/deltanet.py",
          "S_KV = S_KV + beta * jnp.outer(k_K, v_V - k_K @ S_KV)",
          "S_KV = S_KV + beta * jnp.outer(k_K, v_V) - beta * jnp.outer(S_KV @ v_V, v_V)"),
    Fault("an exponent that can be positive, in a chunk", "mamba2", "memzoo/ops/chunks.py",
          "jnp.where(row == column, 0, jnp.where(seen_B1CC, log_BHCC, -jnp.inf))\n"
          '    return matmul("rbhik,bhjk->rbhij", q_RBHCK, k_BHCK) * jnp.exp(log_BHCC)',
          "jnp.where(row == column, 0, log_BHCC)\n"
          '    return matmul("rbhik,bhjk->rbhij", q_RBHCK, k_BHCK) * jnp.where(seen_B1CC, jnp.exp(log_BHCC), 0)',
          MATRIX),
    Fault("an exponent that can be positive, in a gate", "slstm", "memzoo/mixers/slstm.py",
          "m_K = jnp.maximum(kept_K, i_K)", "m_K = i_K"),
    Fault("the update gate the wrong way round", "gru", "memzoo/mixers/gru.py",
          "z_F * h_F + (1 - z_F) * n_F", "(1 - z_F) * h_F + z_F * n_F"),
    Fault("a window one token too long", "attention", "memzoo/ops/window_attention.py",
          "(near_L > t_C1 - W)", "(near_L >= t_C1 - W)", "test_window_attention"),
    Fault("gates see the next token", "gru", "memzoo/mixers/gru.py",
          'a_BTE = nn.Dense(3 * F, name="in", **gates, **kinds)(x_BTD)',
          'a_BTE = nn.Dense(3 * F, name="in", **gates, **kinds)(jnp.roll(x_BTD, -1, axis=1))'),
    Fault("the floor of the denominator is 1", "mlstm", "memzoo/mixers/mlstm.py",
          "jnp.exp(-m_BTH))[..., None]", "1.0)[..., None]"),
    Fault("the imaginary part with the wrong sign", "lru", "memzoo/mixers/lru.py", "-h_BTN.imag", "h_BTN.imag"),
    Fault("the inner gradient is taken at the wrong weights", "titans", "memzoo/ops/memorize.py",
          "each(rule.weights, anchor)", "each(rule.weights, A)", "test_memorize"),
    # Gradients
    Fault("a gradient of the incoming state dropped, delta rule", "deltanet", "memzoo/ops/delta_rule.py",
          "for x in gradients), dS_BHKV, None", "for x in gradients), 0 * dS_BHKV, None", MATRIX),
    Fault("a gradient of the incoming state dropped, selective scan", "mamba", "memzoo/ops/selective_scan.py",
          "dB_BTN, dC_BTN, dh_BND, None", "dB_BTN, dC_BTN, 0 * dh_BND, None", "test_selective_scan"),
    Fault("the last chunk is another one, backward", "gla", "memzoo/ops/linear_attention.py",
          "jnp.arange(N) == N - 1", "jnp.arange(N) == N - 2", MATRIX),
    Fault("the adjoint's decay is off by one token", "min_gru", "memzoo/ops/linear_scan.py",
          "next_BTX = jnp.concatenate([a_BTX[:, 1:], jnp.zeros_like(a_BTX[:, :1])], axis=1)", "next_BTX = a_BTX",
          "test_linear_scan"),
    Fault("the adjoint's matrices are not transposed", "gru", "memzoo/ops/newton.py",
          "J if J.ndim == 3 else jnp.swapaxes(J, 3, 4)", "J", "test_nonlinear_scan"),
    Fault("a parameter without a gradient", "gated_deltanet", "memzoo/mixers/gated_deltanet.py",
          "log_a_BTH = -rate_H *", "log_a_BTH = -jax.lax.stop_gradient(rate_H) *"),
    Fault("a kernel's gradient begins one token late", "min_gru", "kernels/memzoo_kernels/linear_scan_tpu.py",
          "if t == end:", "if t == end - 1:", "test_linear_scan"),
)  # fmt: skip
assert len(FAULTS) == 40


@dataclasses.dataclass(frozen=True)
class Config:
    long: bool = False
    """The long tests too."""
    only: tuple[int, ...] = ()
    """Numbers of faults, from 1; all by default."""
    jobs: int = 2
    """How many at a time, one process each."""


def selection(fault: Fault, long: bool) -> list[str]:
    """What pytest is to run, the quick ones to fail first."""
    name = fault.architecture
    files = [f"tests/mixers/test_{name}.py", "tests/test_contract.py"]
    folders = ("ops", "kernels") if long or fault.file.startswith("kernels") else ("ops",)
    files += [f"tests/{folder}/{fault.ops}.py" for folder in folders] if fault.ops else []
    files = [file for file in files if (ROOT / file).exists()]
    of_others = f"not test_contract or [{name}] or [{name}-"
    return [*files, "-k", of_others, "-m", "not aot" if long else "not long and not aot"]


def found_by(fault: Fault, copy: Path, long: bool) -> str:
    """The first test that fails with the fault in `copy`, or "" if all pass. The copy is as it was afterwards."""
    path = copy / fault.file
    sound = path.read_text()
    path.write_text(sound.replace(fault.old, fault.new))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-rfE", "-p", "no:cacheprovider"]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        result = subprocess.run(
            [*command, *selection(fault, long)], cwd=copy, env=env, capture_output=True, text=True, timeout=1800
        )
    except subprocess.TimeoutExpired:
        return "half an hour without an end"
    finally:
        path.write_text(sound)
    if result.returncode == 0:
        return ""
    lines = re.findall(r"^(?:FAILED|ERROR) (\S+)", result.stdout, re.MULTILINE)
    if result.returncode != 1 or not lines:
        raise RuntimeError(f"{fault.what}: pytest ended with {result.returncode}\n{result.stdout}{result.stderr}")
    return lines[0]


def main(config: Config) -> int:
    for fault in FAULTS:
        count = (ROOT / fault.file).read_text().count(fault.old)
        if count != 1:
            raise SystemExit(f"{fault.what}: expected its text once in {fault.file}, found it {count} times")
    numbers = config.only or range(1, len(FAULTS) + 1)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(config.jobs) as pool:
        files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        copies = [Path(folder) / str(job) for job in range(config.jobs)]
        for copy in copies:
            for file in filter(lambda file: (ROOT / file).is_file(), files.splitlines()):
                (copy / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / file, copy / file)

        def one(number):
            fault, begun = FAULTS[number - 1], time.monotonic()
            copy = copies.pop()
            try:
                by = found_by(fault, copy, config.long)
            finally:
                copies.append(copy)
            line = f"{number:2}  {by or 'NOT FOUND':80}  {time.monotonic() - begun:4.0f} s  {fault.what}"
            print(f"{line} ({fault.architecture}, {fault.file})", flush=True)
            return bool(by)

        found = sum(pool.map(one, numbers))
    print(f"{found} of {len(numbers)} found")
    return int(found < len(numbers))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
