"""Double precision on devices that have none."""

from torch import Tensor

WITHOUT_DOUBLE = {"mps"}
"""Types of devices that have no float64."""


def double(tensor: Tensor) -> Tensor:
    """The tensor in float64: where it is, or on the CPU if there is no float64 there."""
    return (tensor.cpu() if tensor.device.type in WITHOUT_DOUBLE else tensor).double()
