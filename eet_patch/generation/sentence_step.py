"""One decode step of a decoder that may attend to sentences, as fairseq's do, over fixed buffers.

Few rows go through `decode_layers`; more go to torch's products, layer by layer, with the step's
attention between them. On CUDA either is captured as a graph and replayed. A step belongs to one
call at a time; `sentence_pool` lends them out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eet_patch.generation.sentence_decoder import (
    SentenceDecoder,
    Sentences,
    before_head,
    product_into,
)
from eet_patch.generation.step import Appended, plain_tensors
from eet_patch.ops import blocks, decode
from eet_patch.ops._extension import extension, place
from eet_patch.ops.launch import (
    NO_NORM,
    KVCache,
    Norm,
    address,
    layernorm,
    linear,
    torch_linear,
)

MAX_GRAPHS = 64  # of one step: batches as they shrink, by so many steps at once
BLOCK = 16  # tokens; capacities are multiples of it, so that calls of like lengths share buffers


def in_blocks(tokens: int) -> int:
    return (tokens + BLOCK - 1) // BLOCK * BLOCK


class SentenceStep:
    """Buffers for up to `rows` rows of `capacity` tokens, over `sentences` of up to `cross_len`,
    and the graphs over them. Rows are the beams of sentences, one sentence behind the other; a row
    stands for a slot, which is the row that it was when the call began.
    """

    def __init__(
        self, model: SentenceDecoder, sentences: int, rows: int, capacity: int, cross_len: int
    ) -> None:
        with plain_tensors():
            self._allocate(model, sentences, rows, capacity, cross_len)

    def _allocate(
        self, model: SentenceDecoder, sentences: int, rows: int, capacity: int, cross_len: int
    ) -> None:
        like = model.word_weight
        self.device, self.rows, self.capacity = like.device, rows, capacity
        self.sentences, self.cross_len = sentences, cross_len
        self.addresses = model.addresses()
        self.stream = place(like)[2]
        hidden_size = model.hidden_size

        def integers(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=like.device)

        i32, i64 = torch.int32, torch.int64
        self.input_ids, self.position_ids = integers(i64, rows), integers(i64, rows)
        self.lengths, self.slots = integers(i32, rows), integers(i32, rows)
        self.cross_rows, self.cross_start = integers(i32, rows), integers(i32, rows)
        self.cross_lengths = integers(i32, rows)
        self.hidden_states = like.new_empty(rows, hidden_size)
        self.logits = like.new_empty(rows, model.head_weight.shape[0])
        cross = (sentences, cross_len, hidden_size)
        self.cross_keys = [like.new_zeros(cross) for _ in model.layers] if cross_len else []
        self.cross_values = [like.new_zeros(cross) for _ in model.layers] if cross_len else []
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._graphs: dict[tuple[object, ...], Any] = {}
        self._graphs_work = like.device.type == "cuda"
        self._pool: Any = None
        self._stream: Any = None
        self._held: dict[object, tuple[Tensor, ...]] = {}
        self.beams = 1
        self.key_rows = integers(i32, rows, capacity)
        # By slot and position: the token fed there, and its hypothesis' score so far.
        self.tokens = integers(i64, rows, capacity)
        self.scores = integers(torch.float32, rows, capacity)
        self.weights: Tensor | None = None
        if cross_len:
            self.weights = integers(torch.float32, rows, capacity, cross_len)
        self._take_capacity(model, capacity)

    def _take_capacity(self, model: SentenceDecoder, capacity: int) -> None:
        """Buffers of that many tokens, with what the present ones hold."""
        like, rows, before = model.word_weight, self.rows, self.capacity
        shape = (rows, model.num_heads, capacity, model.hidden_size // model.num_heads)
        had = bool(self.keys)
        # What holds the present buffers too: else all of them would stand beside all the new ones.
        self._graphs.clear()
        self.layers: tuple[decode.DecodeLayer, ...] = ()

        def longer(old: Tensor) -> Tensor:
            new = old.new_zeros((*old.shape[:1], capacity, *old.shape[2:]))
            new[:, :before] = old
            return new

        # Zeros and not whatever lay there: a masked key times a weight of zero must not be a NaN.
        for buffers in (self.keys, self.values):
            for index in range(len(model.layers)):
                new = like.new_zeros(shape)
                if had:
                    new[:, :, :before] = buffers[index]
                    buffers[index] = new
                else:
                    buffers.append(new)
        if had:
            self.key_rows = longer(self.key_rows)
            self.tokens, self.scores = longer(self.tokens), longer(self.scores)
            self.weights = None if self.weights is None else longer(self.weights)
        self.capacity = capacity
        self._bind(model)

    def _bind(self, model: SentenceDecoder) -> None:
        self._graphs.clear()
        heads = model.num_heads
        layers = []
        for index, layer in enumerate(model.layers):
            cross = layer.cross
            if cross is not None:
                keys, values = (
                    t[index].unflatten(2, (heads, -1)).transpose(1, 2)
                    for t in (self.cross_keys, self.cross_values)
                )
                cross = cross._replace(keys=keys, values=values)
            layers.append(
                layer._replace(
                    key_cache=self.keys[index], value_cache=self.values[index], cross=cross
                )
            )
        self.layers = tuple(layers)
        self._table = decode.pack_layers(layers, False, model.post_norm)
        self._fused_rows = min(self.rows, decode.best_rows(self.hidden_states))
        self._workspace = decode.decode_layers_workspace(
            self._table, model.word_weight, self._fused_rows
        )

    def grow(self, model: SentenceDecoder, capacity: int) -> None:
        """Room for `capacity` tokens, which stand elsewhere from then on."""
        self.addresses = ()  # memory may run out on the way: nobody is lent the step then
        self._held.clear()
        with plain_tensors():
            self._take_capacity(model, capacity)
        self.addresses = model.addresses()

    def nbytes(self) -> int:
        """Of all that the step holds on the device."""
        lists = (*self.keys, *self.values, *self.cross_keys, *self.cross_values)
        own = (value for value in vars(self).values() if isinstance(value, Tensor))
        held = (tensor for tensors in self._held.values() for tensor in tensors)
        return sum(tensor.nbytes for tensor in (*own, *lists, *held, self._table.device))

    def hold(self, key: object, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The tensors that `make` returned when this key came first, for what is appended to the
        step.
        """
        if key not in self._held:
            with plain_tensors():
                self._held[key] = make()
        return self._held[key]

    def begin(
        self, model: SentenceDecoder, beams: int, batch: int, first: int, seen: Sentences | None
    ) -> None:
        """Sets the state before the first step of `batch` sentences: the token to feed is `first`,
        and nothing is there but the sentences.
        """
        if beams != self.beams:
            self._graphs.clear()  # the launches differ
        self.beams = beams
        rows = batch * beams
        for tensor, value in (
            (self.input_ids, first),
            (self.position_ids, model.first_position),
            (self.lengths, 0),
            (self.tokens, first),
        ):
            tensor.fill_(value)
        self.scores.zero_()
        torch.arange(self.rows, out=self.slots)
        self.cross_lengths.zero_()
        if seen is None:
            return
        sentence = torch.arange(batch, dtype=torch.int32, device=self.device)
        for target, source in (
            (self.cross_rows, sentence),
            (self.cross_start, seen.start),
            (self.cross_lengths, seen.end),
        ):
            target[:rows] = source.repeat_interleave(beams)
        length, size = seen.states.shape[1:]
        states = seen.states
        on_cuda = self.device.type == "cuda"
        if on_cuda and length < self.cross_len:
            # Products of whole buffers need no launch to put them there; nobody sees the rest.
            states = F.pad(states, (0, 0, 0, self.cross_len - length))
        flat = states.reshape(-1, size)
        for keys, values, (key_weight, key_bias, value_weight, value_bias) in zip(
            self.cross_keys, self.cross_values, model.cross_projections, strict=True
        ):
            for target, weight, bias in (
                (keys, key_weight, key_bias),
                (values, value_weight, value_bias),
            ):
                if on_cuda:
                    product_into(target[:batch].view(len(flat), -1), flat, weight, bias)
                    continue
                (made,) = blocks.project_qkv(flat, (weight,), (bias,), False, NO_NORM, parts=1)
                target[:batch, :length] = made.view(batch, length, -1)

    def skip(self, model: SentenceDecoder, beams: int, tokens: Tensor) -> Tensor:
        """Feeds what all hypotheses begin with, (batch, length) tokens, in one pass; returns what
        the head reads, (batch * length, its size). For decoders alone.
        """
        batch, length = tokens.shape
        positions = torch.arange(length, device=self.device)
        hidden_states = self.keys[0].new_empty(batch * length, model.hidden_size)
        self._embed(model, hidden_states, tokens.reshape(-1), positions + model.first_position)
        hidden_states = hidden_states.view(batch, length, -1)
        placement = "post" if model.post_norm else "pre"
        for index, layer in enumerate(model.layers):
            keys, values = (t[index][: batch * beams : beams] for t in (self.keys, self.values))
            hidden_states = blocks.attention_block(
                hidden_states,
                layer.qkv_weights,
                layer.qkv_biases,
                layer.out_weight,
                layer.out_bias,
                False,
                model.num_heads,
                layer.softmax_scale,
                Norm(placement, layer.norm1_weight, layer.norm1_bias, model.norm_eps),
                causal=True,
                cache=KVCache(keys, values, 0),
            )
            hidden_states = self._feed_forward(model, layer, hidden_states)
        rows = batch * beams
        own = torch.arange(rows, dtype=torch.int32, device=self.device)[:, None]
        self.key_rows[:rows, :length] = own // beams * beams
        self.lengths.fill_(length)
        self.position_ids.fill_(model.first_position + length)
        return before_head(model, hidden_states.view(batch * length, -1))

    def keep_rows(self, kept: Tensor) -> None:
        """Goes on with these rows alone, in this order; their slots go with them."""
        for state in (
            self.input_ids,
            self.position_ids,
            self.lengths,
            self.slots,
            self.cross_rows,
            self.cross_start,
            self.cross_lengths,
            self.key_rows,
        ):
            state[: len(kept)] = state[kept]

    # --- one step --------------------------------------------------------------------------------

    def run(
        self, model: SentenceDecoder, rows: int, appended: Appended | None = None, steps: int = 1
    ) -> None:
        """Steps of the first `rows` rows: the logits of each, and what is `appended` to them, whose
        last launch is `hypothesis_step` where there are several.
        """

        def launch() -> None:
            try:
                for step in range(steps):
                    self._launch(model, rows, chained=step > 0)
                    if appended is not None:
                        appended.launch()
            except RuntimeError as error:  # kernels are loaded at their first launch
                if "cudaErrorMemoryAllocation" in str(error):
                    raise torch.OutOfMemoryError(str(error)) from error
                raise

        if not self._graphs_work:
            launch()
            return
        key = (rows, None if appended is None else appended.key, steps)
        graph = self._graphs.get(key)
        if graph is not None:
            try:
                graph.replay()
            except RuntimeError as error:  # its first launch takes memory of its own
                self._give_up_graphs("launch", error)
                launch()
            return
        launch()  # also loads the kernels, which a capture must not
        if len(self._graphs) >= MAX_GRAPHS:
            self._graphs.clear()
        try:
            self._graphs[key] = self._captured(launch)
        except RuntimeError as error:
            self._give_up_graphs("capture", error)

    def _captured(self, launch: Callable[[], None]) -> Any:
        """A graph with memory of its own for what torch allocates inside; captured without the
        synchronisation and collection of `torch.cuda.graph`.
        """
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        if not self._graphs:  # torch doesn't take a pool again whose graphs are all gone
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                launch()
            finally:
                graph.capture_end()
        return graph

    def _give_up_graphs(self, what: str, error: RuntimeError) -> None:
        self._graphs_work = False
        self._graphs.clear()  # the memory may be short
        warnings.warn(
            f"eet_patch could not {what} a decode step ({error}); it runs without a CUDA graph, at "
            "the speed of its launches",
            stacklevel=3,
        )

    def ends_in_head(self, model: SentenceDecoder, rows: int) -> bool:
        """Whether the last launch of a step is that of `decode_layers`, with its head."""
        return rows <= self._fused_rows and model.project_out is None and model.head_bias is None

    def _launch(self, model: SentenceDecoder, rows: int, chained: bool) -> None:
        hidden_states, logits = self.hidden_states[:rows], self.logits[:rows]
        self._embed(model, hidden_states, self.input_ids[:rows], self.position_ids[:rows], chained)
        if rows <= self._fused_rows:
            norm = model.final_norm
            head = None
            if self.ends_in_head(model, rows):
                head = decode.DecodeHead(model.head_weight, norm.weight, norm.bias, logits)
            decode.launch_decode_layers(
                hidden_states,
                self._table,
                self.lengths,
                model.activation,
                model.norm_eps,
                self._workspace,
                hidden_states,
                None,
                self.slots,
                self._key_rows(),
                None,
                head,
                chained=model.project_in is None,
                cross=self._view(),
            )
            if head is not None:
                return
            states = hidden_states
            if model.project_out is not None:
                weight, bias = model.project_out
                states, norm = linear(states, (weight,), (bias,), False, norm=norm), NO_NORM
            linear(states, (model.head_weight,), (model.head_bias,), False, norm=norm, out=logits)
            return
        states = before_head(model, self._through_layers(model, hidden_states))
        product_into(logits, states, model.head_weight, model.head_bias)

    def _view(self) -> decode.CrossView | None:
        if not self.cross_len:
            return None
        return decode.CrossView(self.cross_rows, self.cross_start, self.cross_lengths, self.weights)

    def _key_rows(self) -> Tensor | None:
        """Where each row's past stands; a sentence's only row has it in its own slot."""
        return None if self.beams == 1 else self.key_rows

    def _embed(
        self,
        model: SentenceDecoder,
        out: Tensor,
        input_ids: Tensor,
        position_ids: Tensor,
        chained: bool = False,
    ) -> None:
        if model.project_in is not None:
            self._embed_projected(model, out, input_ids, position_ids)
            return
        positions, norm = model.position_weight, model.embed_norm
        rows, hidden_size = out.shape
        extension().embedding(
            out.data_ptr(),
            model.word_weight.data_ptr(),
            address(positions),
            0,
            input_ids.data_ptr(),
            position_ids.data_ptr(),
            0,
            address(norm.weight),
            address(norm.bias),
            rows,
            hidden_size,
            model.word_weight.shape[0],
            0 if positions is None else positions.shape[0],
            0,
            position_ids.shape[0],
            0,
            model.word_scale,
            norm.eps,
            *place(out),
            chained=chained,
        )

    def _embed_projected(
        self, model: SentenceDecoder, out: Tensor, input_ids: Tensor, position_ids: Tensor
    ) -> None:
        assert model.project_in is not None
        words = F.embedding(input_ids, model.word_weight) * model.word_scale
        product_into(out, words, *model.project_in)
        if model.position_weight is not None:
            positions = F.embedding(position_ids, model.position_weight)
            out.view(-1, len(positions), out.shape[1]).add_(positions)
        if model.embed_norm.placement is not None:
            layernorm(out, model.embed_norm, out)

    def _through_layers(self, model: SentenceDecoder, hidden_states: Tensor) -> Tensor:
        placement = "post" if model.post_norm else "pre"
        context = torch.empty_like(hidden_states)
        for layer in self.layers:
            norm = Norm(placement, layer.norm1_weight, layer.norm1_bias, model.norm_eps)
            query, key, value = blocks.project_qkv(
                hidden_states,
                layer.qkv_weights,
                layer.qkv_biases,
                False,
                NO_NORM if model.post_norm else norm,
                chained=True,
            )
            decode.launch_step_attention(
                context,
                query,
                layer.key_cache,
                layer.value_cache,
                model.num_heads,
                layer.softmax_scale,
                self.lengths,
                new=(key, value),
                shared_rows=self.beams,
                cache_rows=self.slots,
                key_rows=self._key_rows(),
            )
            hidden_states = blocks.project_out(
                context, layer.out_weight, layer.out_bias, False, norm, hidden_states, chained=True
            )
            if layer.cross is not None:
                hidden_states = self._cross_attention(model, layer, layer.cross, hidden_states)
            hidden_states = self._feed_forward(model, layer, hidden_states)
        return hidden_states

    def _cross_attention(
        self,
        model: SentenceDecoder,
        layer: decode.DecodeLayer,
        cross: decode.CrossLayer,
        hidden_states: Tensor,
    ) -> Tensor:
        placement = "post" if model.post_norm else "pre"
        norm = Norm(placement, cross.norm_weight, cross.norm_bias, model.norm_eps)
        normed = hidden_states if model.post_norm else layernorm(hidden_states, norm)
        query = torch_linear(normed, cross.query_weight, cross.query_bias, False)
        context = torch.empty_like(hidden_states)
        decode.launch_step_attention(
            context,
            query,
            cross.keys,
            cross.values,
            model.num_heads,
            layer.softmax_scale,
            self.cross_lengths,
            shared_rows=self.beams,
            kv_start=self.cross_start,
            cache_rows=self.cross_rows,
            weights=self.weights if layer is self.layers[-1] else None,
            weight_rows=self.slots,
            weight_positions=self.lengths,
        )
        return blocks.project_out(
            context, cross.out_weight, cross.out_bias, False, norm, hidden_states, chained=True
        )

    def _feed_forward(
        self, model: SentenceDecoder, layer: decode.DecodeLayer, hidden_states: Tensor
    ) -> Tensor:
        placement = "post" if model.post_norm else "pre"
        return blocks.ffn(
            hidden_states,
            layer.fc1_weight,
            layer.fc1_bias,
            layer.fc2_weight,
            layer.fc2_bias,
            False,
            model.activation,
            Norm(placement, layer.norm2_weight, layer.norm2_bias, model.norm_eps),
            chained=True,
        )
