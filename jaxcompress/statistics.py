"""Statistics of activations, for `jaxcompress.calibrate`."""

from jaxcompress._ranges import entropy, mse, percentile, snr
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
    "minmax",
    "moving_average",
    "mse",
    "percentile",
    "second_moment",
    "snr",
]
