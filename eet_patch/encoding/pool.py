"""The graphs of encoders on CUDA, and the buffers that they read and write: bounded, reported,
freed with the model, by `disable()` and after an out-of-memory.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eet_patch import patching, reporting
from eet_patch.generation.step import plain_tensors
from eet_patch.generation.torch_graph import TorchGraph as Graph
from eet_patch.generation.torch_graph import settings as settings
from eet_patch.ops._extension import extension
from eet_patch.ops.packing import Places, Starts

if TYPE_CHECKING:
    from eet_patch.encoding.packed import EncoderLayer, Shape

MAX_STEPS = 2  # of an encoder: one for each stream that calls it
# Shapes of a step that have graphs; the one that has waited longest gives way. Texts sorted by
# length and cut into batches of 32, as sentence encoders do, come in some 50 shapes in turn.
MAX_GRAPHS = 160
MAX_SEEN = 512  # shapes that a graph is made for when they come again
# Buffers and scratch of a step. A batch of more tokens than fit keeps the GPU busy for longer than
# its launches take, and runs without a graph.
MAX_BYTES = 384 * 2**20
# A graph of so many layers goes ahead of the graph of the others, whose parameters are looked at
# while the device does these.
HEAD_LAYERS = 2
LEAST_ROWS = 1024
LEAST_BATCH = 256
# Rows of hidden states that are alive at once, at most, while a layer runs: input, query, key,
# value and context; or input, the inner rows (4 as wide, mostly) and their product.
ROWS_ALIVE = 8

_lock = threading.Lock()
_steps: weakref.WeakKeyDictionary[Any, list[Step]] = weakref.WeakKeyDictionary()


class Answer:
    """Where the device says what it found in a mask: pinned memory, one call after the other."""

    def __init__(self) -> None:
        with plain_tensors():
            self.summary = torch.zeros(4, dtype=torch.int64, pin_memory=True)
        self.ticket = 0

    def next(self) -> Answer:
        self.ticket += 1
        return self

    def wait(self, like: Tensor) -> tuple[int, int, int]:
        """The number of real tokens, the length of the longest row, whether the mask says more."""
        index = like.device.index
        stream = torch._C._cuda_getCurrentRawStream(index)
        return extension().await_summary(self.summary.data_ptr(), self.ticket, index, stream)


def head_layers(num_layers: int) -> int:
    return HEAD_LAYERS if num_layers > 2 * HEAD_LAYERS else num_layers


def _keep(held: OrderedDict[Any, Any], key: object, value: object, most: int) -> None:
    """The newest `most` of them stay."""
    held[key] = value
    held.move_to_end(key)
    while len(held) > most:
        held.popitem(last=False)


class Step:
    """The buffers of one encoder on one stream, and the graphs over them."""

    def __init__(self, like: Tensor, hidden_size: int, stream: int) -> None:
        self.busy = False
        self.stream = stream
        self._layers: object = None
        self._device, self._hidden_size = like.device, hidden_size
        self._like = torch.empty(0, dtype=like.dtype, device=like.device)
        self._graphs: OrderedDict[tuple[object, ...], list[Graph]] = OrderedDict()
        self._seen: OrderedDict[tuple[object, ...], None] = OrderedDict()
        self._graphs_work = True
        self._hidden_states: Tensor | None = None
        self._parts: dict[int, Tensor] = {}  # the first rows of it
        self._integers: Tensor | None = None
        self._places: dict[tuple[int, int, int], Places] = {}
        self._pool: Any = None
        self._pool_bytes = 0
        self.answer = Answer()
        with plain_tensors():
            self.starts = Starts.empty(LEAST_BATCH, like.device)

    def fits(self, like: Tensor, hidden_size: int) -> bool:
        mine = (self._like.dtype, self._device, self._hidden_size)
        return mine == (like.dtype, like.device, hidden_size)

    def begun(self, layers: object, max_batch: int) -> bool:
        """Whether it is ready for such a call as it is."""
        return self._layers is layers and self.starts.cu_seqlens.shape[0] > max_batch

    def begin(self, layers: object, max_batch: int) -> None:
        """Makes the step ready for a call of up to `max_batch` sequences."""
        if self._layers is not layers:
            self.clear()
        self._layers = layers
        if self.starts.cu_seqlens.shape[0] <= max_batch:
            self._graphs.clear()
            with plain_tensors():
                self.starts = Starts.empty(max_batch, self._device)

    def clear(self) -> None:
        self._graphs.clear()
        self._hidden_states, self._pool, self._pool_bytes = None, None, 0
        self._parts.clear()

    def nbytes(self) -> int:
        held = (self._hidden_states, self._integers, *self.starts)
        return sum(t.nbytes for t in held if t is not None) + self._pool_bytes

    def num_graphs(self) -> int:
        return len(self._graphs)

    def buffer(self, rows: int) -> Tensor | None:
        """(rows, hidden_size) for the first layer's input, at the same address for as long as
        graphs hold it; None where there are no graphs.
        """
        if not self._graphs_work:
            return None
        part = self._parts.get(rows)
        if part is not None:
            return part
        if self._hidden_states is not None and self._hidden_states.shape[0] >= rows:
            return self._part(self._hidden_states, rows)
        row_bytes = self._hidden_size * self._like.itemsize * (1 + ROWS_ALIVE)
        capacity = max(LEAST_ROWS, 1 << (rows - 1).bit_length())
        if capacity * row_bytes > MAX_BYTES:
            capacity = rows
        if capacity * row_bytes > MAX_BYTES:
            return None
        self.clear()  # before the larger ones are there
        with plain_tensors():
            self._hidden_states = self._like.new_empty(capacity, self._hidden_size)
        return self._part(self._hidden_states, rows)

    def _part(self, whole: Tensor, rows: int) -> Tensor:
        """Slicing takes longer than looking up."""
        if len(self._parts) >= MAX_SEEN:
            self._parts.clear()
        with plain_tensors():
            part = self._parts[rows] = whole[:rows]
        return part

    def places(self, capacity: int, padded: int, batch: int, device: torch.device) -> Places:
        """Room for what is found in one mask, which the step's next call writes to again."""
        key = (capacity, padded, batch)
        found = self._places.get(key)
        if found is not None:
            return found
        count = capacity + padded + 2 * batch
        if (
            self._integers is None
            or self._integers.shape[0] < count
            or len(self._places) >= MAX_SEEN
        ):
            self._places.clear()
        with plain_tensors():
            if self._integers is None or self._integers.shape[0] < count:
                # On this step's stream, where what reads the old one is queued already.
                most = max(4 * LEAST_ROWS, 1 << (count - 1).bit_length())
                self._integers = torch.empty(most, dtype=torch.int32, device=device)
            found = self._places[key] = Places.within(self._integers, *key)
        return found

    def begin_graphs(self, shape: Shape, settings: tuple[object, ...]) -> list[Graph] | None:
        """Replays the graph of the first layers, if there are graphs of the shape: these."""
        graphs = self._graphs.get((shape, settings))
        if graphs is not None:
            graphs[0].replay()
        return graphs

    def run(
        self,
        shape: Shape,
        settings: tuple[object, ...],
        layers: Sequence[EncoderLayer],
        again: Callable[[], None],
        ready: Callable[[int], bool] | None,
        begun: list[Graph] | None = None,
    ) -> Tensor | None:
        """The rows in the buffer after the last layer; the step's next call overwrites them. None
        if `ready(1)` says no. `settings` are torch's, now; `again` writes the first layer's input
        to the buffer once more; `begun`: of `begin_graphs`.
        """
        from eet_patch.encoding.packed import run_layers

        assert self._hidden_states is not None
        buffer = self._parts.get(shape.rows)
        if buffer is None:
            buffer = self._part(self._hidden_states, shape.rows)
        key = (shape, settings)
        graphs = begun or self._graphs.get(key)
        if graphs is None and ready is not None and not ready(1):
            return None
        # Once without a graph: a shape may never come again, and kernels are loaded at their first
        # launch, which a capture must not do.
        if graphs is None and key in self._seen:
            graphs, ready = self._captured(buffer, layers, shape), None
        if graphs is None:
            _keep(self._seen, key, None, MAX_SEEN)
            return run_layers(buffer, layers, self.starts, shape)
        try:
            if begun is None:
                graphs[0].replay()
            if ready is not None and not ready(1):
                return None
            for graph in graphs[1:]:
                graph.replay()
        except RuntimeError as error:
            self._give_up("launch", error)
            if ready is not None and not ready(1):
                return None
            again()
            return run_layers(buffer, layers, self.starts, shape)
        _keep(self._graphs, key, graphs, MAX_GRAPHS)
        return buffer

    def _captured(
        self, buffer: Tensor, layers: Sequence[EncoderLayer], shape: Shape
    ) -> list[Graph] | None:
        from eet_patch.encoding.packed import run_layers

        def launch(part: Sequence[EncoderLayer]) -> None:
            if self._pool_bytes == 0:
                # One block for all graphs, out of which each takes its own: grown from graph to
                # graph, the pool would keep what is too small for the next.
                assert self._hidden_states is not None
                self._hidden_states.new_empty(ROWS_ALIVE, *self._hidden_states.shape)
            # Onto the buffer that it came from: one address serves all graphs.
            run_layers(buffer, part, self.starts, shape, buffer)

        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        head, graphs = head_layers(len(layers)), []
        try:
            with plain_tensors():
                for part in filter(None, (layers[:head], layers[head:])):
                    before = torch.cuda.memory_reserved(self._device)
                    graph = Graph(self._device, self.stream, self._pool)
                    graph.capture(partial(launch, part))
                    graphs.append(graph)
                    taken = torch.cuda.memory_reserved(self._device) - before
                    self._pool_bytes += max(0, taken)
        except RuntimeError as error:
            self._give_up("capture", error)
            return None
        return graphs

    def _give_up(self, what: str, error: RuntimeError) -> None:
        self._graphs_work = False
        self.clear()  # the memory may be short
        warnings.warn(
            f"eet_patch could not {what} the layers of an encoder ({error}); they run without a "
            "CUDA graph, at the speed of their launches",
            stacklevel=3,
        )


def borrow(
    owner: Any, layers: object, like: Tensor, hidden_size: int, max_batch: int
) -> Step | None:
    """A step of `owner` on the current stream, nobody else's until it is given back; None where
    others hold all there may be.
    """
    stream = torch._C._cuda_getCurrentRawStream(like.device.index)
    with _lock:
        steps = _steps.get(owner)
        if steps is None:
            steps = _steps[owner] = []
        for idle in steps:
            if idle.stream == stream and not idle.busy and idle.fits(like, hidden_size):
                if idle.begun(layers, max_batch):
                    idle.busy = True
                    return idle
        steps[:] = [step for step in steps if step.busy or step.fits(like, hidden_size)]
        step = next((s for s in steps if s.stream == stream), None)
        if step is None and len(steps) < MAX_STEPS:
            step = Step(like, hidden_size, stream)
            steps.append(step)
        if step is None or step.busy or not step.fits(like, hidden_size):
            return None
        step.busy = True
    try:
        step.begin(layers, max_batch)
    except BaseException:
        give_back(step)
        raise
    return step


def give_back(step: Step) -> None:
    step.busy = False


def release() -> None:
    """Frees all graphs and buffers."""
    with _lock:
        held = bool(_steps)
        _steps.clear()
    if held:
        torch.cuda.empty_cache()  # what was a graph's goes nowhere else by itself


def _all_steps() -> list[Step]:
    with _lock:
        return [step for steps in _steps.values() for step in steps]


def held_bytes() -> int:
    return sum(step.nbytes() for step in _all_steps())


def num_graphs() -> int:
    return sum(step.num_graphs() for step in _all_steps())


reporting.MEMORY["encoder steps (packed tokens, scratch of graphs)"] = held_bytes
patching.at_disable(release)
