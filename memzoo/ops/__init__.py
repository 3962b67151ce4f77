"""The recurrences that several architectures share: pure functions on arrays, each in several forms."""

from memzoo.ops.affine_scan import affine_scan
from memzoo.ops.delta_rule import delta_rule
from memzoo.ops.diagonal_ssm import diagonal_ssm, zero_order_hold
from memzoo.ops.direction_scan import direction, direction_scan
from memzoo.ops.dplr_delta_rule import dplr_delta_rule
from memzoo.ops.hippo_memory import hippo_memory, reconstruct
from memzoo.ops.linear_attention import linear_attention, normalised_linear_attention
from memzoo.ops.linear_scan import linear_scan
from memzoo.ops.max_scan import max_scan
from memzoo.ops.memorize import memorize
from memzoo.ops.memory import Gates, MemoryState, Rule, memory_state
from memzoo.ops.nonlinear_scan import check_jacobian, newton_scan, nonlinear_scan
from memzoo.ops.recur import recur, widen
from memzoo.ops.selective_scan import selective_scan
from memzoo.ops.short_conv import short_conv
from memzoo.ops.time_invariant import time_invariant
from memzoo.ops.unit import unit
from memzoo.ops.window_attention import window_attention
