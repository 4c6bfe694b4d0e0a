"""`PrunedInputArray`: a weight whose products prune the activations first."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import quax
from jax import lax
from jax.extend.core import Primitive

from jaxcompress._quax import stop_gradient_p
from jaxcompress.arrays._activation_sparsity import ActivationSparsity
from jaxcompress.arrays._base import CompressedArray
from jaxcompress.arrays._quantized import replace

__all__ = ["PrunedInputArray"]


_NO_RULE = "no rule that prunes activations"


class PrunedInputArray(CompressedArray):
    """A weight, dense or compressed, of whose input most features are made zero.

    A product is that of `array` with what `pruning` leaves of the activations, which are
    quantized after it where `array` asks for that. `threshold` has the rank of the array,
    size 1 or that of a layer or expert axis; it is None unless `pruning` is static.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> rules = {"w": jc.prune.ActivationSparsity(0.5)}
    >>> params = jc.prune.prune_activations({"w": jnp.ones((2, 1))}, rules)
    >>> params["w"]
    PrunedInputArray(float32[2,1], 50% of each token, path='w')
    >>> jc.accelerate(lambda p, x: x @ p["w"])(params, jnp.array([[3.0, 4.0]]))
    Array([[4.]], dtype=float32)
    """

    array: Any
    threshold: Any = None
    pruning: ActivationSparsity = eqx.field(static=True, kw_only=True)
    path: str = eqx.field(static=True, kw_only=True, default="")

    def aval(self) -> jax.core.ShapedArray:
        return jax.core.ShapedArray(self.array.shape, self.array.dtype)

    def materialise(self) -> jax.Array:
        """The dense weight; what it does to activations is lost."""
        dense = self.array
        return jnp.asarray(dense.materialise() if isinstance(dense, CompressedArray) else dense)

    def lowered(self) -> jax.Array:
        self.note("expand", "-", "materialised", _NO_RULE)
        return self.materialise()

    def decoded_for(self, primitive: Primitive, why: str = _NO_RULE) -> jax.Array:
        return super().decoded_for(primitive, why)

    def viewed(self, primitive: Primitive, params: dict[str, Any]) -> CompressedArray | None:
        threshold = self.threshold
        if primitive is lax.transpose_p and threshold is not None:
            threshold = lax.transpose(threshold, params["permutation"])
        elif primitive is lax.squeeze_p and threshold is not None:
            threshold = lax.squeeze(threshold, params["dimensions"])
        elif primitive in (lax.reshape_p, lax.broadcast_in_dim_p):
            shape = params["new_sizes" if primitive is lax.reshape_p else "shape"]
            if tuple(shape) == self.shape and not params.get("dimensions"):
                return self  # as indexing leaves one behind it
            if threshold is not None and threshold.size > 1:
                return None
            threshold = None if threshold is None else threshold.reshape([1] * len(shape))
        elif primitive is lax.convert_element_type_p:
            if not jnp.issubdtype(params["new_dtype"], jnp.floating):
                return None
        elif primitive not in (lax.transpose_p, lax.squeeze_p, lax.copy_p, stop_gradient_p):
            return None
        run = lambda array: primitive.bind(array, **params)
        return replace(self, array=quax.quaxify(run)(self.array), threshold=threshold)

    def __repr__(self) -> str:
        if isinstance(self.array, CompressedArray):
            inside = repr(self.array)
        elif hasattr(self.array, "shape"):
            inside = f"{self.array.dtype.name}[{','.join(map(str, self.array.shape))}]"
        else:  # a tree of labels in the shape of this array
            return f"PrunedInputArray(array={self.array}, threshold={self.threshold})"
        each = f"{self.pruning.group_size} features" if self.pruning.group_size else "each token"
        each = "all tokens" if self.pruning.static else each
        return (
            f"PrunedInputArray({inside}, {self.pruning.sparsity:.0%} of {each}, path={self.path!r})"
        )
