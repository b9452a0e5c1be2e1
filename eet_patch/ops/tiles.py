"""Products of many rows by the extension's own tiles (Hopper, half precision), with bias,
activation or residual added while the sums are in registers, and where they are worth it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from eet_patch.ops._extension import ACTIVATION_CODES, EXTENSION, extension, place
from eet_patch.ops.launch import Biases, Weights, address, three_addresses

TILED_DTYPES = (torch.float16, torch.bfloat16)


@functools.cache
def has_tiles(device: int) -> bool:
    """Whether the extension was built for this GPU's warpgroup instructions."""
    if EXTENSION is None or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    return "90a" in EXTENSION.build_info()["cuda_archs"].split(";")


def takes_tiles(flat: Tensor, weights: Weights, biases: Biases, in_out: bool) -> bool:
    """Whether `linear_tiles` can be called: (rows, in_features), contiguous, (out, in) weights."""
    if flat.device.type != "cuda" or in_out or flat.dtype not in TILED_DTYPES:
        return False
    if flat.shape[1] % 8 or weights[0].shape[0] % 8 or not has_tiles(flat.device.index):
        return False
    tensors = (flat, *weights, *(bias for bias in biases if bias is not None))
    return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


def tile_for(
    flat: Tensor,
    weights: Weights,
    biases: Biases,
    in_out: bool,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> int | None:
    """The tile by which `linear_tiles` was measured faster than torch's product and the kernels
    that would stand behind it; None where torch's are, or where it can't be called.
    """
    if not takes_tiles(flat, weights, biases, in_out):
        return None
    return None


def linear_tiles(
    flat: Tensor,
    weights: Weights,
    biases: Biases,
    tile: int,
    activation: str | None = None,
    residual: Tensor | None = None,
    chained: bool = False,
) -> Tensor:
    """`activation(flat @ weight.T + bias)`, or `flat @ weight.T + bias + residual`: (rows,
    in_features) to (rows, len(weights) * out_features), unchecked. `chained`: the kernel ahead on
    the stream wrote no weights, so that this one may start before it has ended.
    """
    rows, in_features = flat.shape
    out_features = weights[0].shape[0]
    out = flat.new_empty(rows, len(weights) * out_features)
    extension().linear_tiles(
        out.data_ptr(),
        flat.data_ptr(),
        three_addresses(weights),
        three_addresses(biases),
        address(residual),
        rows,
        in_features,
        out_features,
        len(weights),
        ACTIVATION_CODES[activation],
        tile,
        chained,
        *place(flat),
    )
    return out
