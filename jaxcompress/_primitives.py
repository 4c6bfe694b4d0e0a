"""Kinds of primitives that those who follow axes through a program treat alike."""

__all__ = ["CUMULATIVE", "ELEMENTWISE", "MOVES", "REDUCTIONS", "WINDOWS"]

# fmt: off
ELEMENTWISE = frozenset([
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh",
    "bessel_i0e", "bessel_i1e", "cbrt", "ceil", "clamp", "convert_element_type", "copy",
    "copy_p", "cos", "cosh", "digamma", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2",
    "expm1", "floor", "ge", "gt", "imag", "integer_pow", "is_finite", "le", "lgamma", "log",
    "log1p", "logistic", "lt", "max", "min", "mul", "name", "ne", "neg", "nextafter", "not",
    "or", "population_count", "pow", "real", "reduce_precision", "rem", "round", "rsqrt",
    "select_n", "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign", "sin",
    "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor",
])
# fmt: on
REDUCTIONS = frozenset(
    f"reduce_{name}" for name in ("and", "max", "min", "or", "prod", "sum", "xor")
)
CUMULATIVE = frozenset(["cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum"])
WINDOWS = frozenset(["reduce_window_max", "reduce_window_min", "reduce_window_sum"])

# They move elements, and do not look at them.
# fmt: off
MOVES = frozenset([
    "broadcast_in_dim", "concatenate", "copy", "pad", "reshape", "rev", "slice", "split",
    "squeeze", "transpose",
])
# fmt: on
