"""A guard that fails on operators which make the host wait for the device."""

from torch.utils._python_dispatch import TorchDispatchMode

FORBIDDEN = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal")


class NoHostSync(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().split(".")[0] in FORBIDDEN:
            raise AssertionError(f"{func.name()} makes the host wait for the device")
        return func(*args, **(kwargs or {}))
