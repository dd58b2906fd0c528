"""Every kernel that is launched, in the configurations that the launchers pick: what is compiled ahead of time."""

from . import distance, fuse, lookup, match, slot_attention


def shipped_kernels(target):
    """Specifications (see `launch.specification`) for an architecture of `launch.ARCHITECTURES`."""
    for module in (distance, match, fuse, lookup, slot_attention):
        yield from module.shipped_kernels(target)
