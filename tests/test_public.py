"""Every public name has a docstring with a running example, and a complete signature."""

import doctest
import inspect
import types

import pytest

import jaxcompress as jc


def public_names():
    """`(name, object)` of everything exported, found by walking `__all__`."""
    seen, queue = {}, [("jaxcompress", jc)]
    while queue:
        prefix, module = queue.pop()
        for name in module.__all__:
            value = getattr(module, name)
            if isinstance(value, types.ModuleType):
                queue.append((f"{prefix}.{name}", value))
            else:
                seen.setdefault(id(value), (f"{prefix}.{name}", value))
    return sorted(seen.values())


NAMES = public_names()


def test_there_are_many_public_names():
    names = {name for name, _ in NAMES}
    assert {"jaxcompress.accelerate", "jaxcompress.prune.sparsify"} <= names
    assert len(names) > 40


@pytest.mark.parametrize(("name", "value"), NAMES, ids=[name for name, _ in NAMES])
def test_example_runs(name, value):
    """A public name without a running example fails."""
    if not callable(value):  # an instance, as a statistic: its class has the example
        value = type(value)
    finder = doctest.DocTestFinder(recurse=False)
    [found] = finder.find(value, name, module=inspect.getmodule(value)) or [None]
    assert found is not None, f"{name} has no docstring"
    assert found.examples, f"{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    output = []
    runner.run(found, out=output.append)
    assert runner.failures == 0, "".join(output)


@pytest.mark.parametrize(("name", "value"), NAMES, ids=[name for name, _ in NAMES])
def test_signature_is_typed(name, value):
    if not inspect.isfunction(value):
        return
    signature = inspect.signature(value)
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, f"{name}({parameter.name})"
    assert signature.return_annotation is not inspect.Signature.empty, name
