"""What the native CPU kernels take, and why not the rest: for the tables of the ops."""

from jaxcompress.ops._choice import Problem

__all__ = ["cpu_refuses", "native_missing", "needs_packing"]


def native_missing() -> str | None:
    """Why there are no native kernels here, or None."""
    from jaxcompress.kernels import cpu

    return cpu.missing()


def cpu_refuses(problem: Problem, platform: str) -> str | None:
    """Why a product is not for the native kernels, or None."""
    if platform != "cpu":
        return "it is for the CPU"
    missing = native_missing()
    if missing:
        return missing
    group = problem.group_size
    if group is not None and group < problem.k and group % 4:
        return f"its groups are multiples of 4, not {group}"
    return None


def needs_packing(why: str) -> str:
    """What `explain` says of a weight whose bytes are not in the kernels' order."""
    return f"{why}; its bytes are rearranged at every call (jc.prepack does it once)"
