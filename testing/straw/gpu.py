"""Every operation of a run, looked at: tensors on the device are fake, tensors of the host are real.

Refused, as on a GPU or because a rank must not: tensors of another device than the rank's, operations that mix host and
device, numpy of a device tensor, pinned memory of a device tensor. Counted: whatever makes the host wait for the device
or copies between the two. A few integers that came from the host are known; other numbers are given: 1.0, 0, False, and
balanced routing.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from testing.straw.record import Record, place

aten = torch.ops.aten
_COPIES = (aten._to_copy.default, aten.copy_.default)
_FEW = 16
_FAKE = FakeTensorMode(allow_non_fake_inputs=True)  # one for all ranks of a process: globals outlive them
_CHOOSES = {aten.nonzero.default: "nonzero", aten.masked_select.default: "masked_select"}


class StrawError(AssertionError):
    """Something that a GPU would refuse, or that a rank must not do."""


class Gpu(TorchDispatchMode):
    """The rank's GPU, for as long as it is entered.

    Args:
        device: the rank's, with its index.
        record: gets what the host waits for.
        choices: token-expert pairs that a router chooses of a microbatch.
    """

    def __init__(self, device: torch.device, record: Record, choices: int):
        super().__init__()
        self.device, self.record, self._choices = device, record, choices
        self.fake = _FAKE
        self._pinned: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._known = WeakTensorKeyDictionary()  # a few integers that came from the host, and what became of them
        self.messages: set[tuple[str, tuple[int, ...]]] = set()  # dtype and shape of what was sent or received

    def __enter__(self) -> Gpu:
        """Enter. What torch makes of Python numbers goes through here on its way to the device, as fake modes ask."""
        torch._C._set_only_lift_cpu_tensors(True)
        FakeTensor.tolist = lambda tensor: self.tolist(tensor)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Leave."""
        torch._C._set_only_lift_cpu_tensors(False)
        del FakeTensor.tolist
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Carry one operation out."""
        kwargs = kwargs or {}
        if any(kind not in (FakeTensor, Tensor, torch.nn.Parameter) for kind in types):
            return NotImplemented  # made of other tensors, as TE's: what it does with those comes here again
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        here = [x for x in tensors if isinstance(x, FakeTensor)]
        target = kwargs.get("device")
        if not here and (target is None or torch.device(target).type == "cpu"):
            return self._on_host(func, args, kwargs)
        for tensor in here:
            self._check(tensor, func)
        if func.namespace == "c10d":
            return self._collective(func, args, tensors)
        if func is aten._local_scalar_dense.default:
            self.record.add("item")
            return self.number(here[0])
        if func is aten._pin_memory.default:
            raise StrawError(f"{place()}: cannot pin {here[0].device}: only host memory can be pinned")
        if func is aten.is_pinned.default:
            return False
        if func in _COPIES:
            return self._copy(func, args, kwargs)
        if target is not None and torch.device(target).type == "cpu":  # empty_like and its kind
            alike = [torch.empty(x.shape, dtype=x.dtype) if isinstance(x, FakeTensor) else x for x in args]
            return self._on_host(func, tuple(alike), kwargs)
        if func is aten.equal.default:
            self.record.add("equal")
            return False
        if func in _CHOOSES:
            return self._choose(func, here)
        hosts = [x for x in tensors if not isinstance(x, FakeTensor) and x.dim()]
        if hosts and here:
            raise StrawError(f"{place()}: {func} mixes {here[0].device} and cpu {tuple(hosts[0].shape)}")
        self._look_for_waits(func, args)
        if func is aten._grouped_mm.default and args[0].dtype is torch.float32:
            # torch's shape rule knows BF16 only, its kernel multiplies float32 one group at a time (2.13).
            out = self._fake(func, (args[0].bfloat16(), args[1].bfloat16(), *args[2:]), kwargs)
            return self._fake(aten.to.dtype, (out, torch.float32), {})
        if func is aten.addmm.dtype_out:
            # torch's shape rule takes the dtype of the result for a factor (2.11; 2.13's does not).
            product = self._fake(aten.mm.default, args[1:3], {})
            self._fake(aten.add_.Tensor, (kwargs["out"], product), {})
            return kwargs["out"]
        return self._fake(func, args, kwargs)

    def _on_host(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Run on real tensors. Pinning is remembered: torch without CUDA cannot pin."""
        if func.namespace == "c10d":
            self.record.add("gloo")
        if func is aten.is_pinned.default:
            return self._is_pinned(args[0])
        pin = kwargs.pop("pin_memory", None) or func is aten._pin_memory.default
        out = args[0].clone() if func is aten._pin_memory.default else func(*args, **kwargs)
        if pin:
            storage = out.untyped_storage()
            self._pinned[storage._cdata] = weakref.ref(storage)  # addresses are used again
        return out

    def _fake(self, func: Any, args: tuple, kwargs: dict) -> Any:
        with self.fake:
            out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, FakeTensor):
                self._check(tensor, func)
        if self._known:
            self._follow(func, args, kwargs, out)
        return out

    def _follow(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        """Keep known integers known through an operation on nothing else."""
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, FakeTensor)]
        if not inputs or any(x not in self._known for x in inputs):
            for tensor in tree_leaves(out):  # what an operation in place has changed
                if isinstance(tensor, FakeTensor):
                    self._known.pop(tensor, None)
            return
        args, kwargs = tree_map_only(FakeTensor, self._known.__getitem__, (args, kwargs))
        results = tree_leaves(func(*args, **{k: v for k, v in kwargs.items() if k != "device"}))
        for tensor, result in zip(tree_leaves(out), results):
            if isinstance(tensor, FakeTensor):
                self._known[tensor] = result

    def _check(self, tensor: FakeTensor, func: Any) -> None:
        if tensor.device != self.device:
            where = f"{place()}: {func} on {tensor.device}; the rank's device is {self.device}"
            raise StrawError(where)

    def _collective(self, func: Any, args: tuple, tensors: list[Tensor]) -> Any:
        """Move nothing. Refuses what NCCL refuses."""
        for tensor in tensors:
            if not isinstance(tensor, FakeTensor):
                raise StrawError(f"{place()}: {func} mixes the device with a host tensor {tuple(tensor.shape)}")
            if not tensor.is_contiguous():
                raise StrawError(f"{place()}: {func} of a tensor that is not contiguous {tuple(tensor.shape)}")
        if func is torch.ops.c10d.alltoall_base_.default:
            for tensor, sizes in ((args[0], args[3]), (args[1], args[4])):
                if sizes and sum(sizes) != tensor.shape[0]:
                    raise StrawError(f"{place()}: split sizes {sizes} are not of {tuple(tensor.shape)}")
        if func in (torch.ops.c10d.send.default, torch.ops.c10d.recv_.default):
            self.messages.update((str(tensor.dtype), tuple(tensor.shape)) for tensor in tensors)
        work = FakeWork().boxed()
        return work if len(func._schema.returns) == 1 else (args[0], work)

    # -- between host and device ---------------------------------------------------------------------------------------

    def _copy(self, func: Any, args: tuple, kwargs: dict) -> Any:
        if func is aten._to_copy.default:
            source, target = args[0], kwargs.get("device")
            to_host = isinstance(source, FakeTensor) and target is not None and torch.device(target).type == "cpu"
            to_here = not isinstance(source, FakeTensor)
            if to_host:
                self._count("to host", kwargs.get("non_blocking"))
                return self.numbers(source).to(kwargs.get("dtype") or source.dtype)
        else:
            target, source = args[:2]
            to_host = isinstance(source, FakeTensor) and not isinstance(target, FakeTensor)
            to_here = isinstance(target, FakeTensor) and not isinstance(source, FakeTensor)
            if to_host:
                self._count("to host", (args[2:] or [kwargs.get("non_blocking")])[0], pinned=self._is_pinned(target))
                return target.copy_(self.numbers(source))
        if to_here:
            waits = not (self._is_pinned(source) and (kwargs.get("non_blocking") or args[2:] == (True,)))
            self._count("to device", not waits, pinned=self._is_pinned(source))
        if to_here and func is aten._to_copy.default:
            dtype = kwargs.get("dtype") or source.dtype
            out = self._fake(aten.empty.memory_format, (source.shape,), {"dtype": dtype, "device": kwargs["device"]})
            if not dtype.is_floating_point and source.numel() <= _FEW:
                self._known[out] = source.to(dtype, copy=True)
            return out
        return self._fake(func, args, kwargs)

    def _is_pinned(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        pinned = self._pinned.get(storage._cdata)
        return pinned is not None and pinned() is storage

    def _count(self, what: str, non_blocking: object, pinned: bool = True) -> None:
        """Count a copy: one that the host need not wait for is asked for as such and has pinned memory on its side.

        Without a target, ``to("cpu", non_blocking=True)`` makes pinned memory of its own."""
        self.record.add(f"{what}, not waited for" if non_blocking and pinned else what)

    def _choose(self, func: Any, here: list[FakeTensor]) -> Tensor:
        """Return what a mask selects: as many as the router chooses."""
        self.record.add(_CHOOSES[func])
        many, source = self._choices, here[0]
        shape = (many,) if func is aten.masked_select.default else (many, source.dim())
        dtype = source.dtype if func is aten.masked_select.default else torch.int64
        with self.fake:
            return torch.empty(shape, dtype=dtype, device=self.device)

    def _look_for_waits(self, func: Any, args: tuple) -> None:
        """Count operations that ask the device for a size. Most others that do raise on fake tensors."""
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            fills = func is not aten.index.Tensor and args[2].numel() == 1 and not any(args[3:])  # as masked_fill
            if not fills and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
                self.record.add("index by a mask")
        elif func is aten._grouped_mm.default and args[0].dtype is not torch.bfloat16:
            self.record.add("grouped_mm not of BF16 reads its offsets")

    # -- numbers -------------------------------------------------------------------------------------------------------

    def tolist(self, tensor: Tensor) -> Any:
        """Return numbers on the device as a list: one copy, whatever their number."""
        self.record.add("tolist")
        return self.numbers(tensor).tolist()

    def number(self, tensor: Tensor) -> float | int | bool:
        """Return what a single number on the device is said to be."""
        return self.numbers(tensor).reshape(-1)[0].item()

    def numbers(self, tensor: Tensor) -> Tensor:
        """Return what numbers on the device are said to be, on the host."""
        if tensor in self._known:
            return self._known[tensor].clone()
        shape = tuple(tensor.shape)
        if tensor.dtype.is_floating_point:
            return torch.ones(shape).to(tensor.dtype)
        if tensor.dtype is torch.int64 and "maybe_move_tensor_to_cpu" in place():  # shares of a router's choices
            return torch.full(shape, self._choices // max(tensor.numel(), 1), dtype=torch.int64)
        return torch.zeros(shape, dtype=tensor.dtype)
