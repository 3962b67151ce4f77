"""Onion quantum reservoir: small quantum systems side by side, simulated, each of which forgets at a rate of its own.

    rho_t = tr_0 [ U_i (s(w_i x_t) (x) rho_{t-1}) U_i' ]        i = 1 .. M
    f_t = <Z .. Z> before the trace, of all sets of qubits        y_t = W_out [f^1 .. f^M] + b_out
    s(phi) = RY(phi + pi/2) |0><0| RY(phi + pi/2)', so that <Z> = -sin phi
    U_i = prod_j exp(-i a_i h_j Z_j)  prod_{j<k} exp(-i a_i J_jk (X_j X_k + Y_j Y_k))

Qubit 0 is measured and set anew for each token; it exchanges what it holds with Q - 1 qubits of memory, by rotations
whose angle a_i says how much: by a small one little, so that the memory is long. That is a quantum channel, which never
moves two states apart; `radius` says how fast they meet. J, h and w are the collection "reservoir", which is not
trained; features and readout are those of `esn`. The state is how much rho differs from the one that knows nothing.

Source: Tandon et al., "Quantum Reservoir Computing for Corrosion Prediction in Aerospace: A Hybrid Approach for
Enhanced Material Degradation Forecasting" (2025), arXiv:2505.22837: reservoirs side by side, whose rotation angles set
the eigenvalues of their evolution. An input qubit that is replaced, and random couplings, are those of Fujii, Nakajima,
"Harnessing disordered-ensemble quantum dynamics for machine learning" (2017), arXiv:1602.08159.
Differs: the circuit is not the first paper's, which its abstract does not give. The second has X X alone, for times
long enough that the fields make an exchange of it; X X + Y Y exchanges in one layer of gates. Expectations are exact,
as of infinitely many measurements; memory begins maximally mixed.

Dims: B batch, T time, D width, M reservoirs, Q qubits, Y = 2^Q, S = Y / 2, X = S S.
"""

import itertools
import math
import numbers
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memzoo import contract, ops
from memzoo.ops.checks import check_impl
from memzoo.ops.initial import within
from memzoo.ops.reservoir import spectral_radius

I, X, Z = np.eye(2), np.array([[0, 1], [1, 0]]), np.diag([1, -1])
Y = 1j * X @ Z


class State(NamedTuple):
    delta_BMSS: jax.Array  # complex; rho - I / S, whose trace is 0


def step(delta_SS, phi, U_YY):
    """One token, one reservoir: (delta, probabilities). This is the definition."""
    S = delta_SS.shape[0]
    mixed_SS = jnp.eye(S, dtype=delta_SS.dtype) / S
    rho_YY = U_YY @ jnp.kron(qubit(phi).astype(delta_SS.dtype), mixed_SS + delta_SS) @ U_YY.conj().T
    traced_SS = jnp.einsum("iaib->ab", rho_YY.reshape(2, S, 2, S))
    return traced_SS - jnp.trace(traced_SS) * mixed_SS, jnp.diagonal(rho_YY).real


def qubit(phi):
    """RY(phi + pi/2) |0>, as a density matrix."""
    c, s = jnp.cos(phi), jnp.sin(phi)
    return jnp.stack([jnp.stack([1 - s, c]), jnp.stack([c, 1 + s])]) / 2


class QuantumReservoir(nn.Module):
    """x_BTD -> (y_BTD, State). The state is complex64, or complex128 when `dtype` is float64.

    Raises ValueError, by name, for fewer than 2 qubits, angles that are not numbers above 0, an input scale below 0,
    and for sizes, inputs, state or resets that do not fit.
    """

    width: int
    qubits: int = 3  # Q of each reservoir, one of them for the input
    angles: tuple[float, ...] = (0.1, 0.2, 0.4, 0.8)  # a_i, of M reservoirs
    input_scale: float = 1.0
    impl: str = "auto"  # 'scan', 'associative'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int, int]:
        """(M, Q, S)"""
        contract.positive(width=self.width, qubits=self.qubits)
        contract.check_numbers(self)
        if self.qubits < 2:
            raise ValueError(f"qubits: expected an integer >= 2, got {self.qubits}")
        good = lambda angle: isinstance(angle, numbers.Real) and 0 < float(angle) < math.inf
        if not self.angles or not all(map(good, self.angles)):
            raise ValueError(f"angles: expected numbers > 0, got {self.angles}")
        if self.input_scale < 0:
            raise ValueError(f"input_scale: expected a number >= 0, got {self.input_scale}")
        return len(self.angles), self.qubits, 2 ** (self.qubits - 1)

    def initial_state(self, batch: int) -> State:
        M, _, S = self.sizes()
        complex_dtype = jnp.promote_types(contract.state_dtype(self.dtype), jnp.complex64)
        return State(jnp.zeros((batch, M, S, S), complex_dtype))

    def radius(self, variables: Any) -> jax.Array:
        """How much of the difference of two states a token leaves in the long run, by reservoir [M], at phi = 0."""
        fixed = variables["reservoir"]
        of_one = lambda U_YY: spectral_radius(channel(U_YY, jnp.zeros(()))[0])
        return jax.vmap(of_one)(self.evolution(fixed["J"], fixed["h"]))

    def evolution(self, J_MQQ, h_MQ):
        """U_MYY"""
        return jax.vmap(unitary)(jnp.asarray(self.angles, J_MQQ.dtype), J_MQQ, h_MQ)

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        check_impl("quantum_reservoir", self.impl, ("scan", "associative"))
        state = contract.begin(self, x_BTD, state, reset_BT)
        (M, Q, _), D, wide = self.sizes(), self.width, contract.state_dtype(self.dtype)

        def fixed(name, init, *shape):
            draw = lambda: init(self.make_rng("params"), shape, self.param_dtype)
            return lax.stop_gradient(self.variable("reservoir", name, draw).value)

        U_MYY = self.evolution(fixed("J", within(1), M, Q, Q).astype(wide), fixed("h", within(1), M, Q).astype(wide))
        w_DM = fixed("w", within(self.input_scale * D**-0.5), D, M).astype(self.dtype)
        phi_BTM = jnp.matmul(x_BTD.astype(self.dtype), w_DM, preferred_element_type=wide)

        p_BTMY, delta_BMSS = quantum_reservoir(phi_BTM, U_MYY, state.delta_BMSS, reset_BT, self.impl)
        f_BTMY = expectations(p_BTMY, Q)[..., 1:]  # without that of no qubit, which is 1
        f_BTN = f_BTMY.reshape(*f_BTMY.shape[:2], -1)
        self.sow("intermediates", "features", f_BTN)
        out = nn.Dense(D, name="out", dtype=self.dtype, param_dtype=self.param_dtype)
        return out(f_BTN), State(delta_BMSS)


def quantum_reservoir(phi_BTM, U_MYY, delta_BMSS, reset_BT, impl="auto"):
    """All T tokens. Returns (p_BTMY, delta_BMSS), p the probabilities of what is measured."""
    if impl != "associative":

        def token(delta_MSS, phi_M):
            return jax.vmap(step)(delta_MSS, phi_M, U_MYY)

        return ops.recur(token, delta_BMSS, (phi_BTM,), reset_BT)
    (B, T, M), S = phi_BTM.shape, delta_BMSS.shape[-1]
    A, x, F, p = jax.vmap(jax.vmap(jax.vmap(channel), (None, 0)), (None, 0))(U_MYY, phi_BTM)
    rows = lambda z: jnp.moveaxis(z, 2, 1).reshape(B * M, T, *z.shape[3:])
    resets = None if reset_BT is None else jnp.repeat(reset_BT, M, axis=0)
    start_RX = delta_BMSS.reshape(B * M, S * S)
    delta_RTX, last_RX = ops.affine_scan(rows(A), rows(x), start_RX, resets, impl=impl)
    before_RTX = jnp.concatenate([start_RX[:, None], delta_RTX[:, :-1]], axis=1)
    if resets is not None:
        before_RTX = jnp.where(resets[..., None], 0, before_RTX)
    p_RTY = rows(p) + jnp.einsum("rtyx,rtx->rty", rows(F), before_RTX, precision="highest").real
    return jnp.moveaxis(p_RTY.reshape(B, M, T, -1), 1, 2), last_RX.reshape(delta_BMSS.shape)


def channel(U_YY, phi):
    """What one token does to delta, as a matrix and a vector, and to the probabilities: A_XX, x_X, F_YX, p_Y."""
    S = U_YY.shape[0] // 2
    U = U_YY.reshape(2 * S, 2, S)
    V = jnp.einsum("yjc,jl,zld->yzcd", U, qubit(phi).astype(U.dtype), U.conj(), precision="highest")
    F_YX = jnp.einsum("yycd->ycd", V).reshape(2 * S, S * S)
    A_XX = jnp.einsum("iaibcd->abcd", V.reshape(2, S, 2, S, S, S)).reshape(S * S, S * S)
    mixed_X = jnp.eye(S, dtype=U.dtype).reshape(-1) / S
    A_XX = A_XX - jnp.outer(mixed_X, jnp.sum(A_XX[:: S + 1], axis=0))  # less the trace of what comes out
    of = lambda W_ZX: jnp.matmul(W_ZX, mixed_X, precision="highest")
    return A_XX, of(A_XX), F_YX, of(F_YX).real


def unitary(angle, J_QQ, h_Q):
    """U_YY: rotations of all pairs about X X and Y Y, then of each qubit about Z, gate by gate."""
    Q = len(h_Q)
    on = lambda sites, pauli: kronecker([pauli if q in sites else I for q in range(Q)])
    gates = [(J_QQ[pair], on(pair, pauli)) for pair in itertools.combinations(range(Q), 2) for pauli in (X, Y)]
    U_YY = jnp.eye(2**Q, dtype=jnp.promote_types(h_Q.dtype, jnp.complex64))
    for strength, P_YY in [*gates, *((h_Q[q], on((q,), Z)) for q in range(Q))]:
        turned_YY = jnp.matmul(jnp.asarray(P_YY, U_YY.dtype), U_YY, precision="highest")
        U_YY = jnp.cos(angle * strength) * U_YY - 1j * jnp.sin(angle * strength) * turned_YY  # P P = I
    return U_YY


def kronecker(factors):
    """The Kronecker product of all, in NumPy."""
    product = np.ones((1, 1))
    for factor in factors:
        product = np.kron(product, factor)
    return product


def expectations(p_BTMY, qubits):
    """Of Z .. Z on every set of qubits, from the probabilities of what they are found in."""
    signs_YY = jnp.asarray(kronecker([X + Z] * qubits), p_BTMY.dtype)
    return jnp.matmul(p_BTMY, signs_YY, precision="highest")
