"""A second device without one: its tensors compute on the CPU, and refuse whatever a graphics card would refuse, and
float64, which Apple's have not.

As a script it runs commands of the command line there: `python elsewhere.py` with a JSON list of their arguments. In a
process of its own, as torch is told of a device once, before the first backward pass.
"""

import json
import sys
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map


class Backend(backend_registration._DummyBackendModule):
    """What torch asks of a device's own module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


backend_registration._setup_privateuseone_for_python_backend("elsewhere", Backend())
ELSEWHERE = torch.device("elsewhere:0")
aten = torch.ops.aten
MOVES = (aten._to_copy.default, aten.to.device, aten.to.dtype_layout, aten.copy_.default)
INDEXING = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default)


class There(Tensor):
    """Says that it is elsewhere; what it holds is here."""

    @staticmethod
    def __new__(cls, here: Tensor):
        layout = {"strides": here.stride(), "storage_offset": here.storage_offset(), "layout": here.layout}
        return torch.Tensor._make_wrapper_subclass(cls, here.shape, dtype=here.dtype, device=ELSEWHERE, **layout)

    def __init__(self, here: Tensor):
        self.here = here

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})

    # What torch itself does for tensors of a device, and does not for those of a class:

    def __getitem__(self, index):
        return super().__getitem__(torch.tensor(index) if isinstance(index, list) else index)

    def __reduce_ex__(self, protocol):
        return self.here.__reduce_ex__(protocol)

    @property
    def data(self):
        return super().data

    @data.setter
    def data(self, other):
        torch.Tensor.data.__set__(self, other)
        self.here = other.here

    def data_ptr(self):
        return 0

    def new_tensor(self, data, **kwargs):
        return torch.tensor(data, **{"dtype": self.dtype, **kwargs}).to(ELSEWHERE)

    def storage(self):
        return self.here.storage()

    def tolist(self):
        return self.here.tolist()


class Elsewhere(TorchDispatchMode):
    """While it is entered, tensors can be made there, and moved."""

    operations = 0
    """Done there so far."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


def run(function: Any, args: tuple, kwargs: dict) -> Any:
    """One operation, here, if it could be done where its tensors are."""
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, There)]
    asked = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
    if function is aten.copy_.default:
        stays = not isinstance(args[0], There)
    else:
        stays = asked.type != ELSEWHERE.type if asked is not None else not there
    if function not in MOVES:
        met = tensors
        if function in INDEXING:  # whose indices, the second argument, may come from the CPU to a tensor that is there
            met = [leaf for leaf in tree_leaves((args[0], args[2:])) if isinstance(leaf, Tensor)]
        if there and any(not isinstance(tensor, There) and tensor.dim() for tensor in met):
            places = [(tensor.device.type, tuple(tensor.shape)) for tensor in tensors]
            raise RuntimeError(f"{function}: tensors on two devices, {places}")
        if not stays and any(isinstance(leaf, torch.Generator) for leaf in leaves):
            raise RuntimeError(f"{function}: a generator of the CPU for tensors elsewhere")

    def here(leaf: Any) -> Any:
        if isinstance(leaf, torch.device):
            return torch.device("cpu")
        return leaf.here if isinstance(leaf, There) else leaf

    result = function(*tree_map(here, args), **tree_map(here, kwargs))
    if stays:
        return result
    Elsewhere.operations += 1
    if any(isinstance(leaf, Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(result)):
        raise TypeError(f"{function}: float64, which is not elsewhere")
    with torch.inference_mode(False):
        result = tree_map(lambda leaf: There(leaf) if isinstance(leaf, Tensor) else leaf, result)
        return return_and_correct_aliasing(function, args, kwargs, result) if there else result


def main(commands: list[list[str]]) -> None:
    from domainstudio import precision
    from domainstudio.app import cli, compare, draw, measure
    from domainstudio.training import ant

    ant.NUM_NOISINGS = ant.FIT_STEPS = 50  # as in conftest.py
    precision.WITHOUT_DOUBLE.add(ELSEWHERE.type)
    with ExitStack() as stack:
        for module in (draw, compare, measure):
            stack.enter_context(patch.object(module, "default_device", lambda: ELSEWHERE))
        stack.enter_context(patch.object(Accelerator, "device", ELSEWHERE))
        stack.enter_context(Elsewhere())
        for argv in commands:
            print("$", *argv, file=sys.stderr)
            before = Elsewhere.operations
            if code := cli.main(argv):
                sys.exit(code)
            assert Elsewhere.operations > before + 100, "it was done on the CPU"


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
