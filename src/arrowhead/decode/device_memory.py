"""Memory of a GPU that two processes share.

    parent    allocate -> a tensor, and a handle to send
    child     attach(handle) -> a tensor on the same memory

The decoder's process writes pixels here, and the network's process reads them: they never visit the
host. The parent owns the memory, so it outlives a child that crashes. The CUDA runtime shares only
what it allocated itself, hence torch's own memory is not used.
"""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

HANDLE_BYTES = 64  # CUDA_IPC_HANDLE_SIZE


class DeviceMemoryError(Exception):
    """CUDA cannot allocate or share memory here."""


class DeviceMemory:
    """uint8 memory of a GPU, as the tensor `pixels` of some shape.

    Attributes:
        pixels: The tensor; it must not be used after `close`.
        handle: What another process needs to `attach` to it; empty if it is attached itself.
    """

    def __init__(self, pixels: torch.Tensor, pointer: int, handle: bytes) -> None:
        self.pixels, self.handle, self._pointer = pixels, handle, pointer

    @staticmethod
    def allocate(shape: tuple[int, ...], device: int) -> DeviceMemory:
        """Allocate memory on a device that other processes can attach to.

        Raises:
            DeviceMemoryError: CUDA does not allow it.
        """
        cudart = _runtime()
        _call(cudart.cudaSetDevice, device)
        pointer = int(_call(cudart.cudaMalloc, math.prod(shape)))
        try:
            handle = _call(cudart.cudaIpcGetMemHandle, pointer)
        except DeviceMemoryError:
            _call(cudart.cudaFree, pointer)
            raise
        content = ctypes.string_at(handle.getPtr(), HANDLE_BYTES)
        return DeviceMemory(_tensor_at(pointer, shape, device), pointer, content)

    @staticmethod
    def attach(handle: bytes, shape: tuple[int, ...], device: int) -> DeviceMemory:
        """The memory that another process allocated; DeviceMemoryError if CUDA does not allow it.

        A process attaches once, and until it ends.
        """
        cudart = _runtime()
        _call(cudart.cudaSetDevice, device)
        opaque = cudart.cudaIpcMemHandle_t()
        ctypes.memmove(opaque.getPtr(), handle, HANDLE_BYTES)
        lazily = cudart.cudaIpcMemLazyEnablePeerAccess
        pointer = int(_call(cudart.cudaIpcOpenMemHandle, opaque, lazily))
        return DeviceMemory(_tensor_at(pointer, shape, device), pointer, b"")

    def close(self) -> None:
        """Free the memory that this process allocated."""
        if self.handle:
            _call(_runtime().cudaFree, self._pointer)
            self.handle = b""


def _runtime() -> Any:
    from cuda.bindings import runtime  # a dependency of torch

    return runtime


def _call(function: Any, *arguments: Any) -> Any:
    """The result of a function of the CUDA runtime."""
    error, *results = function(*arguments)
    if int(error):
        raise DeviceMemoryError(f"{function.__name__}: {getattr(error, 'name', error)}")
    return results[0] if results else None


class _Memory:
    """Memory that torch does not own."""

    def __init__(self, pointer: int, shape: tuple[int, ...]) -> None:
        about = {"shape": shape, "typestr": "|u1", "data": (pointer, False), "version": 3}
        self.__cuda_array_interface__ = about


def _tensor_at(pointer: int, shape: tuple[int, ...], device: int) -> torch.Tensor:
    import torch

    return torch.as_tensor(_Memory(pointer, shape), device=f"cuda:{device}")
