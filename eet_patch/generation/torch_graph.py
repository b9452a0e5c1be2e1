"""CUDA graphs of launches of torch's among ours, with torch's allocations inside."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

_capturing = threading.Lock()
_capture_streams: dict[tuple[int, int], torch.cuda.Stream] = {}


class TorchGraph:
    """A CUDA graph of torch's launches and ours, for replay on one stream. What they allocate comes
    from `pool`, which graphs that run one after the other may share, or from one of its own.
    """

    def __init__(self, device: torch.device, stream: int, pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._device, self._key = device, (device.index, stream)
        self._pool = pool

    def capture(self, launch: Callable[[], None]) -> None:
        with _capturing:
            # cuBLAS has a workspace of 32 MiB for each stream that it was called on, also where
            # that stream was only captured: graphs that can't run at the same time share one.
            stream = _capture_streams.get(self._key)
            if stream is None:
                stream = _capture_streams[self._key] = torch.cuda.Stream(self._device)
            stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(stream):
                # Other threads may go on to allocate and to synchronise.
                self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    launch()
                finally:
                    self._graph.capture_end()

    def replay(self) -> None:
        self._graph.replay()


def settings() -> tuple[object, ...]:
    """Of torch, which a graph of its products and attentions bakes in."""
    cuda = torch.backends.cuda
    try:
        float32 = cuda.matmul.allow_tf32
    except RuntimeError:  # set by the interface that torch has beside it from 2.9 on
        float32 = cuda.matmul.fp32_precision  # type: ignore[attr-defined]
    return (
        float32,
        cuda.matmul.allow_fp16_reduced_precision_reduction,
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        cuda.flash_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )
