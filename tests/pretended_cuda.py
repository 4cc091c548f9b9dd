"""A CUDA device that is none: tensors that say `cuda:0`, lie in the CPU's memory, and refuse what CUDA's refuse.

`pretend_cuda()` lets a test run the path of a card with true values on any machine, and counts what a card would wait
for. Refused: tensors of two devices in one operation (but for numbers without axes), `.numpy()`, random numbers from a
generator of the other device. Not seen: operations that CUDA lacks for a dtype, autocast, speed, memory.
A module's parameters are replaced when it moves, as with `torch.__future__.set_overwrite_module_params_on_conversion`.
"""

import contextlib
import sys
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

CUDA = torch.device("cuda", 0)
PACKAGE = str(Path(__file__).parents[1] / "fit3d_ns")
aten = torch.ops.aten

SHAPED_BY_VALUES = {
    "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount", "equal",
    "_local_scalar_dense", "_linalg_check_errors",
}  # fmt: skip
"""Operations whose result the host has to wait for: its shape, or what Python gets, depends on values."""
INDEXING = {"index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
"""Operations that take indices of the CPU for tensors of the card."""
NO_NUMBERS = {"cat", "stack", "mm", "addmm", "bmm", "baddbmm", "gather", "scatter", "scatter_add", "index_add_"}
"""Operations that take not even a number without axes from the other device."""


@dataclass
class Card:
    """What the host waited for, and what it sent: places in the package as `room/file.py:line`."""

    waits: Counter[str] = field(default_factory=Counter)
    """`operation @ place`: one for each time that the host needs a value of the card."""
    uploads: Counter[str] = field(default_factory=Counter)
    """Copies to the card, by place."""
    work: Counter[str] = field(default_factory=Counter)
    """`launches` of kernels, and the `bytes` and `flops` of these: all that goes in and comes out, products and sums of
    matrix products and convolutions. What gsplat's own kernels do in between is not seen."""

    def clear(self) -> None:
        self.waits.clear()
        self.uploads.clear()
        self.work.clear()

    def count_work(self, given: list[Tensor], made: Any, flops: int = 0) -> None:
        """Adds one launch."""
        tensors = {id(leaf): leaf for leaf in [*given, *tree_leaves(made)] if isinstance(leaf, Tensor)}
        moved = sum(leaf.numel() * leaf.element_size() for leaf in tensors.values())
        self.work.update(launches=1, bytes=moved, flops=flops)


_card = Card()


class PretendedTensor(torch.Tensor):
    """A tensor on the pretended card. To C++ it is one of the CPU; to Python, and to `isinstance`, one of the card."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        _check_devices(func, args, given)
        _count_waits(func, args)
        with no_dispatch(), torch._C.DisableTorchFunction():
            result = func(*args, **(kwargs or {}))
            if not func.is_view:
                count = flop_registry.get(func._overloadpacket)
                flops = count(*args, **(kwargs or {}), out_val=result) if count else 0
                _card.count_work(given, result, flops)
        known = {id(tensor) for tensor in given}
        return tree_map(lambda leaf: leaf if id(leaf) in known else place(leaf, True), result)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"pretended {place(self, False)!r}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return place(self, False).__reduce_ex__(protocol)

    def get_device(self) -> int:
        return 0

    def tolist(self) -> Any:
        _wait("tolist")
        return place(self, False).tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it to host memory.")

    def __array__(self, *_: Any, **__: Any) -> Any:
        self.numpy()

    def pin_memory(self, *_: Any) -> Any:
        raise RuntimeError("cannot pin a tensor of cuda:0; only dense CPU tensors can be pinned")


class PretendedGenerator(torch.Generator):
    """A generator that remembers which device it was made for."""

    def __new__(cls, device: Any = "cpu") -> "PretendedGenerator":
        generator = super().__new__(cls, "cpu")
        generator.on_card = _is_cuda(device)
        return generator

    def __init__(self, device: Any = "cpu") -> None:
        pass

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA if self.on_card else torch.device("cpu")


@contextlib.contextmanager
def pretend_cuda(shared_bytes: int = 227 * 1024) -> Iterator[Card]:
    """Everything within runs as if torch had found one card, whose tiles may take `shared_bytes` (227 KiB: H100)."""
    _card.clear()
    properties = types.SimpleNamespace(
        name="Pretended", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132,
        shared_memory_per_block_optin=shared_bytes, shared_memory_per_block=48 * 1024,
    )  # fmt: skip
    answers: dict[str, Any] = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "set_device": None,
        "empty_cache": None, "get_device_name": "Pretended", "get_device_capability": (9, 0), "manual_seed": None,
        "manual_seed_all": None, "is_bf16_supported": True, "max_memory_allocated": 0, "memory_allocated": 0,
        "memory_reserved": 0, "max_memory_reserved": 0, "reset_peak_memory_stats": None, "_lazy_init": None,
        "mem_get_info": (70 << 30, 80 << 30), "get_device_properties": properties, "set_rng_state": None,
        "set_rng_state_all": None, "is_current_stream_capturing": False,
    }  # fmt: skip
    functions: dict[str, Callable[..., Any]] = {
        "synchronize": lambda *_: _wait("synchronize"),
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
    }
    functions |= {name: lambda *_, answer=answer, **__: answer for name, answer in answers.items()}
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **functions))
        stream = types.SimpleNamespace(is_capturing=lambda: False)
        # Optimizers ask it since torch 2.12 or so.
        stack.enter_context(mock.patch("torch.accelerator.current_stream", lambda *_: stream, create=True))
        stack.enter_context(mock.patch.object(torch, "Generator", PretendedGenerator))
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrites)
        stack.enter_context(mock.patch.object(threading.Thread, "run", _run_watched))
        stack.enter_context(_Calls())
        yield _card


def _run_watched(thread: threading.Thread, run: Callable[[threading.Thread], None] = threading.Thread.run) -> None:
    """Modes of torch belong to a thread, so each new one gets its own."""
    with _Calls():
        run(thread)


def place(value: Any, on_card: bool) -> Any:
    """The same memory as a tensor of the card, or of the CPU; no graph, and nothing is counted."""
    if not isinstance(value, Tensor) or isinstance(value, PretendedTensor) == on_card:
        return value
    with no_dispatch(), torch._C.DisableTorchFunction():
        return value.detach().as_subclass(PretendedTensor) if on_card else value.detach()


class _Calls(TorchFunctionMode):
    """Calls of torch from Python: those that name a device, move between devices, or draw random numbers."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        first = args[0] if args else None
        if isinstance(first, Tensor) and func in (Tensor.to, Tensor.cuda, Tensor.cpu, Tensor.type_as):
            return _move(func, first, args[1:], kwargs)
        if func is Tensor.new_tensor:
            return place(func(*args, **kwargs), isinstance(first, PretendedTensor))
        if func is Tensor.is_pinned:
            return False
        if func is Tensor.pin_memory and not isinstance(first, PretendedTensor):
            return first
        if name == "one_hot":
            # Made in C++ from pieces, one of them on what C++ takes for the device.
            return place(func(place(first, False), *args[1:], **kwargs), isinstance(first, PretendedTensor))
        generator, device = kwargs.get("generator"), kwargs.get("device")
        if name == "_parse_to" or (generator is None and device is None and func is not Tensor.new_tensor):
            return func(*args, **kwargs)
        is_on_card = any(isinstance(leaf, PretendedTensor) for leaf in tree_leaves((args, kwargs)))
        target = is_on_card if device is None else _is_cuda(device)
        if generator is not None and getattr(generator, "on_card", False) != target:
            wanted = "cuda" if target else "cpu"
            raise RuntimeError(f"Expected a '{wanted}' device type for generator but found the other ({name})")
        if device is None and func is not Tensor.new_tensor:
            return func(*args, **kwargs)
        kwargs.pop("device", None)
        kwargs.pop("pin_memory", None)
        needs_grad = kwargs.pop("requires_grad", False)
        result = func(*args, **kwargs)
        if isinstance(first, Tensor) and isinstance(first, PretendedTensor) != target and name.startswith("as"):
            return _cross(result, target)
        result = tree_map(lambda leaf: place(leaf, target), result)
        return result.requires_grad_() if needs_grad else result


class _Copy(torch.autograd.Function):
    """A copy on the other device."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, on_card: bool) -> Tensor:
        ctx.on_card = on_card
        return place(place(value, False).clone(), on_card)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return place(gradient, not ctx.on_card), None


def _move(func: Any, value: Tensor, args: tuple, kwargs: dict) -> Tensor:
    """`.to`, `.cuda`, `.cpu` and `.type_as`: a copy where the device changes, then the rest of what was asked for."""
    device = {Tensor.cuda: CUDA, Tensor.cpu: "cpu"}.get(func, kwargs.pop("device", None))
    rest = []
    for argument in [*args, *([kwargs.pop("other")] if "other" in kwargs else [])]:
        if isinstance(argument, Tensor):
            device = argument.device
            rest.append(argument.dtype)
        elif isinstance(argument, (str, torch.device)):
            device = argument
        elif isinstance(argument, torch.dtype):
            rest.append(argument)
    target = isinstance(value, PretendedTensor) if device is None else _is_cuda(device)
    if isinstance(value, PretendedTensor) != target:
        value = _cross(value, target)
        kwargs.pop("copy", None)
    wanted = rest or {key: option for key, option in kwargs.items() if key != "non_blocking" and option is not None}
    return value.to(*rest, **kwargs) if wanted else value


def _cross(value: Tensor, on_card: bool) -> Tensor:
    if on_card:
        _card.uploads[_find_place()] += 1
    else:
        _wait("cpu")
    return _Copy.apply(value, on_card) if value.requires_grad else place(place(value, False).clone(), on_card)


def _check_devices(func: Any, args: tuple, given: list[Tensor]) -> None:
    """Raises what CUDA raises for tensors of two devices."""
    name = func._schema.name.removeprefix("aten::")
    others = [tensor for tensor in given if not isinstance(tensor, PretendedTensor)]
    # Zeros that autograd itself makes are the CPU's here, since to C++ everything is.
    if not others or torch._C._current_graph_task_id() != -1:
        return
    if name == "copy_":
        if isinstance(args[0], PretendedTensor):
            _card.uploads[_find_place()] += 1
        else:
            _wait("copy_")
        return
    if name in INDEXING:
        if not isinstance(args[0], PretendedTensor):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        others = [] if len(args) < 3 or isinstance(args[2], PretendedTensor) else [args[2]]
    if any(tensor.ndim for tensor in others) or (others and name in NO_NUMBERS):
        shapes = [tuple(tensor.shape) for tensor in others]
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
            f" ({name}; on the CPU: {shapes})"
        )


def _count_waits(func: Any, args: tuple) -> None:
    name = func._schema.name.removeprefix("aten::")
    if name in INDEXING and any(isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]):
        # A number for all chosen places is a fill; everything else has to know how many there are.
        if name.startswith("index_put") and args[2].ndim == 0:
            return
        _wait("boolean index")
    elif name in SHAPED_BY_VALUES or (name == "repeat_interleave" and len(args) < 3):
        _wait({"_local_scalar_dense": "item"}.get(name, name))


def _wait(kind: str) -> None:
    # Other threads are there to wait.
    if threading.current_thread() is threading.main_thread():
        _card.waits[f"{kind} @ {_find_place()}"] += 1


def _find_place() -> str:
    """The innermost line of the package."""
    frame = sys._getframe(2)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back  # type: ignore[assignment]
    return "?" if frame is None else f"{frame.f_code.co_filename[len(PACKAGE) + 1 :]}:{frame.f_lineno}"


def _is_cuda(device: Any) -> bool:
    return isinstance(device, int) or torch.device(device).type == "cuda"
