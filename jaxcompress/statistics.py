"""Statistics of activations, for `jaxcompress.calibrate`."""

from jaxcompress._ranges import entropy, magnitudes, mse, percentile, snr
from jaxcompress._statistics import (
    Observed,
    Statistic,
    absmax,
    minmax,
    moving_average,
    second_moment,
)

__all__ = [
    "Observed",
    "Statistic",
    "absmax",
    "entropy",
    "magnitudes",
    "minmax",
    "moving_average",
    "mse",
    "percentile",
    "second_moment",
    "snr",
]
