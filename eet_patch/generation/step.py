"""One decode step of a decoder over fixed buffers: embedding, all layers, head, token selection.

On CUDA a step is captured as a graph and replayed. Everything that changes from step to step lies
in the buffers, so that a graph serves every step of every call with the same batch, capacity and
selection. A step belongs to one call at a time; `pool` lends them out.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eet_patch.generation import by_products
from eet_patch.generation.torch_graph import TorchGraph, settings
from eet_patch.ops import decode, selection
from eet_patch.ops._extension import extension, place
from eet_patch.ops.launch import Norm, address

MAX_GRAPHS = 40  # of one step: batch sizes as it shrinks, and selections
# From this hidden size on the layers of half precision go through torch's products, by device. ms a
# token on an H100, by `decode_layers` and by products: hidden 4096, 40 layers, batch 4 7.32 and
# 7.59, batch 16 10.26 and 10.09; hidden 5120, 36 layers, batch 4 10.86 and 9.92.
MIN_SIZE_BY_PRODUCTS = {"cuda": 5120}
GRAPH_STEPS = 4  # of one graph, where nothing of the host's stands between two steps


def plain_tensors() -> contextlib.ExitStack:
    """Tensors made inside may be written to by a later call, in inference mode or out of it."""
    scopes = contextlib.ExitStack()
    scopes.enter_context(torch.inference_mode(False))
    scopes.enter_context(torch.no_grad())
    return scopes


class DecoderModel(NamedTuple):
    """Where a pre-norm decoder's parameters lie; the caches of `layers` are filled in by a step."""

    layers: tuple[decode.DecodeLayer, ...]
    word_weight: Tensor
    position_weight: Tensor
    norm_weight: Tensor
    norm_bias: Tensor | None
    head_weight: Tensor  # (vocab_size, hidden_size)
    num_heads: int
    activation: str | None
    norm_eps: float
    in_out: bool

    @property
    def hidden_size(self) -> int:
        return self.word_weight.shape[1]

    @property
    def vocab_size(self) -> int:
        return self.head_weight.shape[0]

    def cache_bytes(self, batch_size: int, capacity: int) -> int:
        """Of a step's keys and values."""
        row = 2 * len(self.layers) * self.hidden_size * self.word_weight.itemsize
        return row * batch_size * capacity

    def addresses(self) -> tuple[object, ...]:
        """What a captured step rests on: every address and number that it bakes in."""
        tensors = (self.word_weight, self.position_weight, self.norm_weight, self.norm_bias)
        found: list[object] = [address(tensor) for tensor in (*tensors, self.head_weight)]
        for layer in self.layers:
            for value in layer:
                if isinstance(value, tuple):
                    found += [address(tensor) for tensor in value]
                elif isinstance(value, Tensor):
                    found.append(value.data_ptr())
                else:
                    found.append(value)
        like = self.word_weight
        found += [like.shape, self.head_weight.shape, like.dtype, like.device]
        found += [self.activation, self.norm_eps, self.in_out, self.num_heads]
        return tuple(found)


class Selection(NamedTuple):
    """How the next token is chosen; `ops.selection.select_token` says what each means."""

    sample: bool
    repetition_penalty: float
    suppressed_tokens: tuple[int, ...]
    eos_token_ids: tuple[int, ...]
    min_new_tokens: int  # counted from the first token that the step chooses
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    pad_token_id: int


class Appended(NamedTuple):
    """What a caller adds to a step, behind its logits, and into its graph."""

    key: tuple[object, ...]  # all that the launches bake in, but for addresses that the step holds
    launch: Callable[[], None]  # allocates nothing on CUDA


def _longer(tensor: Tensor, dim: int, size: int, fill: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = size
    longer = tensor.new_full(shape, fill)
    longer.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return longer


class DecodeStep:
    """Buffers for up to `batch_size` rows of `capacity` tokens, and the graphs over them.

    A row of the step stands for a slot, which is a row of the batch that the call began with; while
    the batch is whole both are the same.
    """

    def __init__(self, model: DecoderModel, batch_size: int, capacity: int) -> None:
        with plain_tensors():
            self._allocate(model, batch_size, capacity)

    def _allocate(self, model: DecoderModel, batch_size: int, capacity: int) -> None:
        like = model.word_weight
        device, hidden_size = like.device, model.hidden_size
        head_dim = hidden_size // model.num_heads
        self.batch_size, self.capacity = batch_size, capacity
        self.addresses = model.addresses()
        self.device, self.dtype = device, like.dtype
        self._graphs: dict[tuple[object, ...], decode.Graph | TorchGraph] = {}
        self._graphs_work = device.type == "cuda"
        self._pool: Any = None  # of the graphs that torch captured
        self._pool_bytes = 0
        least = MIN_SIZE_BY_PRODUCTS.get(device.type)
        self.by_products = least is not None and hidden_size >= least and like.itemsize == 2

        def integers(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        cache = (batch_size, model.num_heads, capacity, head_dim)
        # Zeros and not whatever lay there: a masked key times a weight of zero must not be a NaN.
        self.keys = [like.new_zeros(cache) for _ in model.layers]
        self.values = [like.new_zeros(cache) for _ in model.layers]
        self.tokens = integers(torch.int64, batch_size, capacity + 1)
        self.input_ids = integers(torch.int64, batch_size)
        self.position_ids = integers(torch.int64, batch_size)
        self.lengths = integers(torch.int32, batch_size)
        self.kv_start = integers(torch.int32, batch_size)
        self.slots = torch.arange(batch_size, dtype=torch.int32, device=device)
        self.finished = integers(torch.uint8, batch_size)
        self.unfinished_count = integers(torch.int32, 1)
        self.hidden_states = like.new_empty(batch_size, hidden_size)
        self.logits = like.new_empty(batch_size, model.vocab_size)
        # For the pool: of the caches' storages, and the stream that all of it was made on.
        self.unshared_uses: list[int] = []
        self.stream = 0
        self.key_rows: Tensor | None = None  # of beams; see `decode_layers`
        self.seen: Tensor | None = None
        self.noise: Tensor | None = None
        self.eos_token_ids: Tensor | None = None
        self.suppressed_tokens: Tensor | None = None
        self.min_len = 0
        self._held: tuple[Any, Any] = (None, ())
        self.pad_token_id = 0
        self._bind(model)
        self._selection_workspace = selection.select_token_workspace(self.logits)

    def _bind(self, model: DecoderModel) -> None:
        """What rests on the addresses and the capacity of the caches."""
        self._table = decode.pack_layers(self._layers(model), model.in_out)
        self._workspace = decode.decode_layers_workspace(
            self._table, model.word_weight, self.batch_size
        )

    def _layers(self, model: DecoderModel) -> list[decode.DecodeLayer]:
        """The model's, with the caches of the step; not kept, for they hold the weights."""
        return [
            layer._replace(key_cache=key, value_cache=value)
            for layer, key, value in zip(model.layers, self.keys, self.values, strict=True)
        ]

    def grow(self, model: DecoderModel, capacity: int, moved: Callable[[int], None]) -> None:
        """Room for `capacity` tokens, which stand elsewhere from then on. Layer by layer, and after
        each `moved(layer_idx)` makes others let go of the old buffers, so that never more than one
        layer is held twice.
        """
        # Memory may run out on the way: nobody is lent the step before all has moved.
        self.addresses = ()
        self._graphs.clear()
        with plain_tensors():
            for layer_idx in range(len(self.keys)):
                for buffers in (self.keys, self.values):
                    buffers[layer_idx] = _longer(buffers[layer_idx], 2, capacity, 0)
                moved(layer_idx)
            self.tokens = _longer(self.tokens, 1, capacity + 1, self.pad_token_id)
            self.key_rows, self._held = None, (None, ())  # of another capacity
            self.capacity = capacity
            self._bind(model)
        self.addresses = model.addresses()

    def nbytes(self) -> int:
        """Of all that the step holds on the device."""
        held = (value for value in list(vars(self).values()) if isinstance(value, Tensor))
        lists = (*self.keys, *self.values, *self._held[1], self._table.device)
        pool_bytes = self._pool_bytes if self._graphs else 0
        return sum(tensor.nbytes for tensor in (*held, *lists)) + pool_bytes

    def hold(self, key: object, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The tensors that `make` returned when this key came first, for what is appended to the
        step; those of another key are let go.
        """
        if self._held[0] != key:
            self._graphs.clear()  # they may hold the others' addresses
            with plain_tensors():
                self._held = (key, make())
        return self._held[1]

    def begin(
        self,
        choice: Selection | None,
        kv_len: int,
        next_ids: Tensor,
        starts: Tensor,
        next_positions: Tensor,
    ) -> None:
        """Sets the state before the first step: `kv_len` keys are there, and `next_ids`
        (batch_size,) is the token to feed, at `next_positions`; `starts` counts padding on the
        left.
        """
        self.lengths.fill_(kv_len)
        self.kv_start.copy_(starts)
        self.input_ids.copy_(next_ids)
        self.position_ids.copy_(next_positions)
        torch.arange(self.batch_size, out=self.slots)
        self.finished.zero_()
        self.unfinished_count.fill_(self.batch_size)
        if choice is None:
            return
        self.pad_token_id = choice.pad_token_id
        self.tokens.fill_(choice.pad_token_id)
        self.min_len = kv_len + 1 + choice.min_new_tokens if choice.min_new_tokens else 0
        self.eos_token_ids = self._constant(self.eos_token_ids, choice.eos_token_ids)
        self.suppressed_tokens = self._constant(self.suppressed_tokens, choice.suppressed_tokens)
        vocab_size = self.logits.shape[1]
        if choice.sample and self.noise is None:
            with plain_tensors():
                self.noise = torch.empty(self.batch_size, vocab_size, device=self.device)

    def share_past(self, kv_len: int, beams: int) -> Tensor:
        """From now on the past is read through `key_rows`, which is returned: the context stands in
        the first cache row of each `beams` rows.
        """
        if self.key_rows is None:
            with plain_tensors():
                self.key_rows = torch.empty(
                    self.batch_size, self.capacity, dtype=torch.int32, device=self.device
                )
        own = torch.arange(self.batch_size, dtype=torch.int32, device=self.device)[:, None]
        self.key_rows[:] = own
        self.key_rows[:, :kv_len] = own // beams * beams
        return self.key_rows

    def note_seen(self, sequences: Tensor, ignored: Tensor | None) -> None:
        """Marks the tokens of `sequences` (batch_size, length) for the repetition penalty, but for
        the first `ignored` (batch_size,) of each row.
        """
        if ignored is not None:
            positions = torch.arange(sequences.shape[1], device=self.device)
            hidden = positions < ignored.to(self.device)[:, None]
            sequences = torch.where(hidden, sequences[:, -1:], sequences)
        vocab_size = self.logits.shape[1]
        packed = selection.seen_tokens(sequences.clamp(max=vocab_size - 1), vocab_size)
        if self.seen is None:
            with plain_tensors():
                self.seen = torch.empty_like(packed)
        self.seen.copy_(packed)

    def _constant(self, held: Tensor | None, values: tuple[int, ...]) -> Tensor | None:
        if not values:
            return None
        if held is None or tuple(held.tolist()) != values:
            self._graphs.clear()  # they may hold the old one's address
            return torch.tensor(values, dtype=torch.int64, device=self.device)
        return held

    def run(
        self,
        model: DecoderModel,
        rows: int,
        choice: Selection | None,
        shared: bool = False,
        appended: Appended | None = None,
        steps: int = 1,
    ) -> None:
        """`steps` steps of the first `rows` rows. Without a `choice` each ends with the logits, or
        with what is `appended` to them. `shared`: the past is read through `key_rows`.
        """
        sample = choice is not None and choice.sample
        while steps > 0:
            count = GRAPH_STEPS if self._graphs_work and steps >= GRAPH_STEPS and not sample else 1
            if sample:
                # All slots, in one call a step, as torch.multinomial draws: the generator then is
                # where the host's own loop would have left it.
                assert self.noise is not None
                self.noise.exponential_()
            self._replay(model, rows, choice, shared, appended, count)
            steps -= count

    def _replay(
        self,
        model: DecoderModel,
        rows: int,
        choice: Selection | None,
        shared: bool,
        appended: Appended | None,
        steps: int,
    ) -> None:
        """`steps` steps by a graph of as many; the first time by their launches."""

        def run() -> None:
            for _ in range(steps):
                self._run(model, rows, choice, shared, appended)

        if not self._graphs_work:
            run()
            return
        min_len = 0 if choice is None else self.min_len
        added = None if appended is None else appended.key
        key: tuple[object, ...] = (rows, choice, min_len, shared, added, steps)
        if self.by_products:
            key += settings()
        graph = self._graphs.get(key)
        if graph is not None:
            try:
                graph.replay()
            except RuntimeError as error:  # its first launch takes memory of its own
                self._give_up_graphs("launch", error)
                run()
            return
        run()  # also loads the kernels, which a capture must not
        if len(self._graphs) >= MAX_GRAPHS:
            self._graphs.clear()
        try:
            if self.by_products:  # torch's allocations are in it
                graph = self._torch_graph(run)
            else:
                graph = decode.Graph(self.device)
                with graph:
                    run()
        except RuntimeError as error:
            self._give_up_graphs("capture", error)
        else:
            self._graphs[key] = graph

    def _torch_graph(self, run: Callable[[], None]) -> TorchGraph:
        if not self._graphs:  # torch doesn't take a pool again whose graphs are all gone
            self._pool, self._pool_bytes = torch.cuda.graph_pool_handle(), 0
        before = torch.cuda.memory_reserved(self.device)
        graph = TorchGraph(self.device, place(self.hidden_states)[2], self._pool)
        graph.capture(run)
        self._pool_bytes += max(0, torch.cuda.memory_reserved(self.device) - before)
        return graph

    def _give_up_graphs(self, what: str, error: RuntimeError) -> None:
        self._graphs_work = False
        self._graphs.clear()  # the memory may be short
        warnings.warn(
            f"eet_patch could not {what} a decode step ({error}); it runs without a CUDA graph, at "
            "the speed of its launches",
            stacklevel=3,
        )

    def _run(
        self,
        model: DecoderModel,
        rows: int,
        choice: Selection | None,
        shared: bool,
        appended: Appended | None,
    ) -> None:
        try:
            self._launch(model, rows, choice, shared, appended)
        except RuntimeError as error:  # kernels are loaded at their first launch
            if "cudaErrorMemoryAllocation" in str(error):
                raise torch.OutOfMemoryError(str(error)) from error
            raise

    def _launch(
        self,
        model: DecoderModel,
        rows: int,
        choice: Selection | None,
        shared: bool,
        appended: Appended | None,
    ) -> None:
        hidden_states, logits = self.hidden_states[:rows], self.logits[:rows]
        where = place(hidden_states)
        hidden_size = model.hidden_size
        whole = rows == self.batch_size
        extension().embedding(
            hidden_states.data_ptr(),
            model.word_weight.data_ptr(),
            model.position_weight.data_ptr(),
            0,
            self.input_ids.data_ptr(),
            self.position_ids.data_ptr(),
            0,
            0,
            0,
            rows,
            hidden_size,
            model.word_weight.shape[0],
            model.position_weight.shape[0],
            0,
            rows,
            0,
            1.0,
            0.0,
            *where,
        )
        key_rows = self.key_rows if shared else None
        if self.by_products:
            by_products.launch_layers(
                hidden_states,
                self._layers(model),
                model.num_heads,
                model.in_out,
                model.activation,
                model.norm_eps,
                Norm("pre", model.norm_weight, model.norm_bias, model.norm_eps),
                model.head_weight,
                logits,
                self.lengths[:rows],
                self.kv_start[:rows],
                None if whole else self.slots[:rows],
                key_rows,
            )
        else:
            self._launch_chain(model, rows, hidden_states, logits, key_rows)
        if appended is not None:
            appended.launch()
        if choice is None:
            return
        selection.launch_select_token(
            logits,
            self.tokens,
            self.input_ids[:rows],
            self.position_ids[:rows],
            self.lengths[:rows],
            self.finished,
            self.unfinished_count,
            self._selection_workspace,
            slots=None if whole else self.slots[:rows],
            seen=self.seen if choice.repetition_penalty != 1.0 else None,
            eos_token_ids=self.eos_token_ids,
            suppressed_tokens=self.suppressed_tokens,
            noise=self.noise if choice.sample else None,
            pad_token_id=choice.pad_token_id,
            min_len=self.min_len,
            top_k=choice.top_k,
            repetition_penalty=choice.repetition_penalty,
            temperature=choice.temperature,
            top_p=choice.top_p,
            min_p=choice.min_p,
            chained=appended is None and not self.by_products,
        )

    def _launch_chain(
        self,
        model: DecoderModel,
        rows: int,
        hidden_states: Tensor,
        logits: Tensor,
        key_rows: Tensor | None,
    ) -> None:
        decode.launch_decode_layers(
            hidden_states,
            self._table,
            self.lengths,
            model.activation,
            model.norm_eps,
            self._workspace,
            hidden_states,
            self.kv_start,
            None if rows == self.batch_size else self.slots,
            key_rows,
            None,
            decode.DecodeHead(model.head_weight, model.norm_weight, model.norm_bias, logits),
            chained=True,
        )

    def keep_rows(self, kept: list[int]) -> None:
        """Goes on with these rows of the step alone, in this order; their slots go with them."""
        index = self._index(kept)
        for state in (
            self.input_ids,
            self.position_ids,
            self.lengths,
            self.kv_start,
            self.slots,
        ):
            state[: len(kept)] = state[index]

    def hide_past(self, rows: list[int]) -> None:
        """These rows of the step read no key but their newest from now on."""
        self.kv_start.index_fill_(0, self._index(rows), self.capacity)

    def _index(self, rows: list[int]) -> Tensor:
        """On the device, without waiting for the steps that are queued there."""
        index = torch.tensor(rows, pin_memory=self.device.type == "cuda")
        return index.to(self.device, non_blocking=True)
