"""Statistics of activations, for `jaxcompress.calibrate`."""

from jaxcompress._calibrate import Observed, Statistic, absmax, second_moment

__all__ = ["Observed", "Statistic", "absmax", "second_moment"]
