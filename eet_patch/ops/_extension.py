"""Loads the compiled extension once, and says why when it can't be loaded.

torch is imported first: the extension takes its OpenMP runtime from there.
"""

from __future__ import annotations

from types import ModuleType

import torch

EXTENSION: ModuleType | None
EXTENSION_ERROR: str | None
try:
    from eet_patch import _C as EXTENSION  # type: ignore[attr-defined,no-redef]

    EXTENSION_ERROR = None
except ImportError as error:
    EXTENSION = None
    EXTENSION_ERROR = f"{type(error).__name__}: {error}"

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ACTIVATION_CODES = {None: 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "silu": 4}
NORM_CODES = {None: 0, "pre": 1, "post": 2}
MASK_NONE, MASK_BOOL_KEEP, MASK_BOOL_DROP, MASK_ADD_FLOAT32, MASK_ADD_ELEMENT = range(5)
MASK_INT_KEEP = 5  # of pack_tokens alone
NO_MASK = (0, MASK_NONE, 0, 0, 0, 0)


def extension() -> ModuleType:
    """The compiled module. Raises RuntimeError with the reason when it could not be loaded."""
    if EXTENSION is None:
        raise RuntimeError(
            f"the compiled part of eet_patch could not be loaded ({EXTENSION_ERROR}); "
            "rebuild it with `pip install .` in the source directory"
        )
    return EXTENSION


def has_cuda() -> bool:
    """Whether the extension was built with its CUDA part."""
    return EXTENSION is not None and bool(EXTENSION.build_info()["cuda"])


HAS_CUDA = has_cuda()
# Newer releases of torch tell a tensor's dtype and layout with its address: 192 parameters are
# compared in 14 us, without that in 33.
_exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
LAYOUTS_ARE_QUICK = (
    EXTENSION is not None and _exchange is not None and EXTENSION.use_tensor_exchange(_exchange)
)
# MKL's products are as good as ours or better below AVX-512, where ours were measured at twice its
# speed.
CPU_PRODUCTS_ARE_OURS = (
    EXTENSION is not None and EXTENSION.build_info()["cpu_capability"] == "avx512"
)


def place(tensor: torch.Tensor) -> tuple[int, int, int, int]:
    """The last four arguments of every bound function: dtype code, device, stream, threads."""
    device = tensor.device
    if device.type == "cpu":
        return DTYPE_CODES[tensor.dtype], -1, 0, torch.get_num_threads()
    index = device.index
    stream = torch._C._cuda_getCurrentRawStream(index)
    return DTYPE_CODES[tensor.dtype], index, stream, 1
