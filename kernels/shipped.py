"""Every kernel that is launched, in the configurations that the launchers pick: what is compiled ahead of time."""

from . import match, select, vote


def shipped_kernels(target):
    """Specifications (see `launch.specification`) for an architecture of `launch.ARCHITECTURES`."""
    for module in (match, vote, select):
        yield from module.shipped_kernels(target)
