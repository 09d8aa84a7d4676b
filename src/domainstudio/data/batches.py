"""Which pictures a step sees: a function of (seed, step), so a resumed run needs no state."""

import torch

_MIX = 2_654_435_761


def step_generator(seed: int, step: int) -> torch.Generator:
    """A CPU generator for everything random in one step."""
    return torch.Generator().manual_seed((seed * _MIX + step) % 2**63)


def batch_indices(num_images: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Indices of step `step` (from 0): shuffled passes over the pictures, laid end to end.

    Every picture is seen once before any is seen twice; a batch may span the end of a pass.
    """
    indices = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(position, num_images)
        order = torch.randperm(num_images, generator=torch.Generator().manual_seed((seed * _MIX + epoch) % 2**63))
        indices.append(int(order[place]))
    return indices
