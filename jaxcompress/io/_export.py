"""What `jax.export` needs to write a program down whose arguments are containers."""

import dataclasses
import json
from typing import Any

import jax
from jax.tree_util import PyTreeDef, default_registry

from jaxcompress.arrays import CompressedArray
from jaxcompress.io._metadata import CONTAINERS, describe, rebuild

__all__: list[str] = []


def _register(cls: type[CompressedArray]) -> None:
    # The children of a container, in their order.
    names = [f.name for f in dataclasses.fields(cls) if not f.metadata.get("static")]

    def write(auxdata: Any) -> bytes:
        # What JAX keeps beside the children is Equinox's; a container made of it is ours.
        leaves = [jax.tree.structure(0)] * len(names)
        treedef = PyTreeDef.from_node_data_and_children(default_registry, (cls, auxdata), leaves)
        array = jax.tree.unflatten(treedef, names)
        return json.dumps([describe(array), array.path]).encode()

    def read(data: bytes) -> Any:
        return json.loads(bytes(data))

    def build(aux_data: Any, children: Any) -> Any:
        description, path = aux_data
        return rebuild(description, dict(zip(names, children)), path)

    jax.export.register_pytree_node_serialization(
        cls,
        serialized_name=f"jaxcompress.{cls.__name__}",
        serialize_auxdata=write,
        deserialize_auxdata=read,
        from_children=build,
    )


for _cls in CONTAINERS.values():
    _register(_cls)
