"""A torch tensor over memory at an address. Owns the two forms of exchange: the array interface and DLPack.

Source: CUDA Array Interface, version 3; DLPack specification, struct DLManagedTensor.
"""

from __future__ import annotations

import ctypes

import torch
from torch.utils.dlpack import from_dlpack

ONE_API, HOST = 14, 1  # DLDeviceType
_NAME = b"dltensor"
_UNSIGNED = 1  # kDLUInt


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _ManagedTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("num_dims", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("manager_context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),  # none: the memory is somebody else's
    )


class DeviceArray:
    """Memory at an address, in the form that torch.cuda takes, on HIP too."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {"shape": (num_bytes,), "typestr": "|u1", "data": (address, False), "version": 3}


def view_at(address: int, num_bytes: int, device_type: int, device_index: int) -> torch.Tensor:
    """A uint8 tensor [num_bytes] over memory that somebody else owns. device_type: DLPack's number.

    The structure (some 100 bytes) outlives the tensor and everything that shares its storage: it is never given back.
    """
    shape = (ctypes.c_int64 * 1)(num_bytes)
    managed = _ManagedTensor(
        data=address, device=_Device(device_type, device_index), num_dims=1, dtype=_DataType(_UNSIGNED, 8, 1), shape=shape
    )
    keep = ctypes.PYFUNCTYPE(None, ctypes.py_object)(("Py_IncRef", ctypes.pythonapi))
    keep(managed)
    new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    capsule = new_capsule(("PyCapsule_New", ctypes.pythonapi))(ctypes.addressof(managed), _NAME, None)
    tensor: torch.Tensor = from_dlpack(capsule)
    return tensor
