"""The distribution that weights begin with."""

import numpy as np


def begins_as_in_torch(weight, fan_in):
    """Uniform in +-fan_in^-1/2, by Kolmogorov and Smirnov's test at 0.1 per cent."""
    u = np.sort((np.ravel(np.float64(weight)) * fan_in**0.5 + 1) / 2)
    return u[0] >= 0 and u[-1] <= 1 and np.abs(u - (np.arange(u.size) + 0.5) / u.size).max() < 2 * u.size**-0.5
