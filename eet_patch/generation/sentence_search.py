"""The search over hypotheses on top of a `SentenceStep`: what fairseq's `SequenceGenerator` does
between two calls of its decoder.

Beams share their past through an index of slots, so that no key or value is moved, and
what has ended is filed on the device. Where nothing but fairseq's plain beam search is asked for, a
step and all that follows it is captured together, and the host looks now and then which sentences
are done, to drop them. Else scores are made and handed to the host's own search in torch, step by
step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eet_patch.generation.loop import BATCH_SIZES, recorded, to_host
from eet_patch.generation.sentence_decoder import SentenceDecoder, Sentences, product_into
from eet_patch.generation.sentence_step import SentenceStep, in_blocks
from eet_patch.generation.step import Appended
from eet_patch.ops import beam_selection
from eet_patch.ops.beam_state import MAX_BEAMS, MAX_CANDIDATES
from eet_patch.ops.hypotheses import Hypotheses, launch_hypothesis_step, torch_hypothesis_step

# Of a graph: the most that may pass between two looks at what is done. Long ones must be worth
# their capture: so many times as many steps are left.
STEPS, TIMES_LEFT = (16, 8, 2), 4
# Batches are filled up to a multiple, so that graphs serve others of like size.
FEW_SENTENCES, MULTIPLE_OF_FEW, MULTIPLE_OF_MANY = 64, 4, 8
SIZES = (*BATCH_SIZES, 96, 128, 192, 256, 384, 512, 768, 1024)
SCORED_ROWS = 256  # rows of logits at a time, in the pass over what all begin with
ALIGNED = 8  # elements
GROWTH = 64


class SearchOptions(NamedTuple):
    """What the generator was asked for."""

    beams: int
    max_len: int  # tokens without the end
    min_len: int
    first: int  # token that all hypotheses begin with
    eos: int
    pad: int
    unk: int
    unk_penalty: float
    temperature: float
    suppressed: tuple[int, ...]
    is_plain: bool  # the host's search is its BeamSearch, and nothing changes its scores


class HostSearch(NamedTuple):
    """The host's own objects.

    `choose` (step, log probabilities (sentences, beams, vocab_size), scores so far (sentences,
    beams, step), tokens or None, which sentences of the batch) returns scores, tokens and beams
    (sentences, kept). `block` (tokens, log probabilities, sentences, step) returns the latter; it
    gets tokens (rows, max_len + 2), filled with padding.
    """

    choose: Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    block: Callable[[Tensor, Tensor, int, int], Tensor] | None


class Ended(NamedTuple):
    """What a search ended with, of each sentence in the order in which it ended; all tokens one
    behind the other.
    """

    counts: list[int]  # hypotheses of each sentence
    lengths: list[int]  # of each hypothesis, in tokens
    scores: Tensor  # (hypotheses,) float32, sums of log probabilities
    tokens: Tensor  # (tokens,)
    positional_scores: Tensor  # (tokens,) float32
    weights: Tensor | None  # (cross_len, tokens) float32


class Search:
    """One search over the step's buffers."""

    def __init__(
        self,
        step: SentenceStep,
        model: SentenceDecoder,
        options: SearchOptions,
        host: HostSearch,
        batch: int,
        sentences: int,
    ) -> None:
        self.step, self.model, self.options, self.host = step, model, options, host
        self.batch, self.sentences = batch, sentences
        self.alive = list(range(sentences))  # the place of each sentence that is under way
        # Which of the batch each is; what fills it up passes for the last one, and is done.
        self.order = torch.arange(sentences, device=step.device).clamp(max=batch - 1)
        self._take_buffers()
        beams = options.beams
        self.running_scores.fill_(-torch.inf)
        self.running_scores[::beams] = 0.0  # so that the others of a sentence don't count
        for tensor in (self.ignored, self.ended, self.is_done):
            tensor.zero_()
        self.is_done[batch:] = 1
        torch.arange(len(self.places), out=self.places)

    def _take_buffers(self) -> None:
        step, options = self.step, self.options
        beams, rows, device = options.beams, step.rows, step.device
        most, kept = rows // beams, min(2 * beams, MAX_CANDIDATES)
        i32, u8, i64 = torch.int32, torch.uint8, torch.int64

        def buffers() -> tuple[Tensor, ...]:
            plain = beams <= MAX_BEAMS
            return (
                torch.zeros(rows, device=device),
                torch.zeros(rows, dtype=u8, device=device),
                torch.zeros(most, dtype=i32, device=device),
                torch.zeros(most, dtype=i32, device=device),
                torch.zeros(most, dtype=u8, device=device),
                torch.zeros(most, beams, device=device),
                torch.zeros(most, beams, dtype=i32, device=device),
                torch.zeros(most, beams, step.capacity, dtype=i32, device=device),
                torch.zeros(rows, kept, device=device),
                torch.zeros(rows, kept, dtype=i32, device=device),
                beam_selection.top_candidates_workspace(step.logits if plain else step.logits[:0]),
            )

        held = step.hold(("search", beams), buffers)
        self.running_scores, self.ignored, self.places, self.ended, self.is_done = held[:5]
        self.ended_scores, self.ended_lengths, self.ended_rows = held[5:8]
        self.best_scores, self.best_tokens, self.workspace = held[8:]
        suppressed = (options.pad, *options.suppressed)
        self.suppressed, self.eos_ids = step.hold(
            ("tokens", suppressed, options.eos),
            lambda: (
                torch.tensor(suppressed, dtype=i64, device=device),
                torch.tensor([options.eos], dtype=i64, device=device),
            ),
        )

    def state(self) -> Hypotheses:
        """The hypotheses of the sentences that are under way."""
        step, count = self.step, len(self.alive)
        rows = count * self.options.beams
        return Hypotheses(
            self.running_scores[:rows],
            self.ignored[:rows],
            self.places[:count],
            step.slots[:rows],
            step.lengths[:rows],
            step.input_ids[:rows],
            step.position_ids[:rows],
            step.key_rows[:rows],
            step.tokens,
            step.scores,
            self.ended,
            self.is_done,
            self.ended_scores,
            self.ended_lengths,
            self.ended_rows,
        )

    # --- one step --------------------------------------------------------------------------------

    def run_plain(self, steps: int) -> None:
        """So many steps, each with plain beam search behind it, in one graph."""
        step, options = self.step, self.options
        rows = len(self.alive) * options.beams
        chained = step.ends_in_head(self.model, rows) and options.temperature == 1.0

        def launch() -> None:
            logits = step.logits[:rows]
            if options.temperature != 1.0:
                logits.div_(options.temperature)
            best, tokens = self.best_scores[:rows], self.best_tokens[:rows]
            beam_selection.launch_top_candidates(
                logits,
                best,
                tokens,
                self.workspace,
                row_scores=self.running_scores[:rows],
                lengths=step.lengths[:rows],
                eos_token_ids=self.eos_ids,
                suppressed_tokens=self.suppressed,
                # It counts a length without the newest token, so the least one is a token longer.
                min_len=options.min_len + 1 if options.min_len > 0 else 0,
                chained=chained,
            )
            launch_hypothesis_step(self.state(), best, tokens, options.eos, chained=True)

        key = (options.beams, options.temperature, options.min_len, options.eos, options.suppressed)
        step.run(self.model, rows, Appended(("plain", options.pad, *key), launch), steps)

    def run_last(self) -> None:
        """The step in which all hypotheses end, behind which plain beam search has no choice."""
        step, options = self.step, self.options
        rows = len(self.alive) * options.beams
        step.run(self.model, rows)
        logits = step.logits[:rows]
        if options.temperature != 1.0:
            logits.div_(options.temperature)
        ends = F.log_softmax(logits, -1, dtype=torch.float32)[:, options.eos]
        best, tokens = self.best_scores[:rows], self.best_tokens[:rows]
        best.fill_(-torch.inf)
        best[:, 0] = ends + self.running_scores[:rows]
        tokens.fill_(options.eos)
        launch_hypothesis_step(self.state(), best, tokens, options.eos)

    def run_in_torch(self, number: int, prefix: Tensor | None, ends_prefix: bool) -> None:
        """A step, and the host's own search behind it. `prefix` (sentences,): the tokens that are
        prescribed now; padding prescribes nothing.
        """
        step, options = self.step, self.options
        count, beams = len(self.alive), options.beams
        rows = count * beams
        step.run(self.model, rows)
        logits = step.logits[:rows]
        if options.temperature != 1.0:
            logits.div_(options.temperature)
        scores = self._log_probabilities(logits, number)
        running = self.running_scores[:rows].view(count, beams, 1)
        prescribed_end = None
        if prefix is not None:
            scores = _prescribe(scores, prefix.repeat_interleave(beams), options.pad)
            if ends_prefix:
                # All beams of such a sentence go on as its first, so that all end.
                prescribed_end = prefix == options.eos
                whole = prescribed_end[:, None, None]
                per_beam = scores.view(count, beams, -1)
                scores = torch.where(whole, per_beam[:, :1], per_beam).view(rows, -1)
                running.copy_(torch.where(whole, running[:, :1], running))
        else:
            if number < options.min_len:
                scores[:, options.eos] = -torch.inf
            if options.suppressed:
                scores[:, list(options.suppressed)] = -torch.inf
        if self.host.block is not None:
            scores = self.host.block(self._tokens_so_far(number), scores, count, number)
        best, tokens, parents = self.host.choose(
            number, scores.view(count, beams, -1), running.expand(-1, -1, number), self.order
        )
        if prescribed_end is not None:
            parents = parents.masked_fill(prescribed_end[:, None], 0)
        torch_hypothesis_step(self.state(), best, tokens, parents, options.eos)

    def _log_probabilities(self, logits: Tensor, number: int) -> Tensor:
        options = self.options
        scores = F.log_softmax(logits, -1, dtype=torch.float32)
        scores.masked_fill_(scores.isnan(), -torch.inf)
        scores[:, options.pad] = -torch.inf
        if options.unk_penalty:
            scores[:, options.unk] -= options.unk_penalty
        if number >= options.max_len:
            scores[:, : options.eos] = -torch.inf
            scores[:, options.eos + 1 :] = -torch.inf
        return scores

    def scores_of(self, tokens: Tensor, logits: Tensor) -> Tensor:
        """(rows,): what `_log_probabilities` has at one token of each row, of whatever length."""
        options = self.options
        scores = F.log_softmax(logits, -1, dtype=torch.float32).gather(1, tokens[:, None])[:, 0]
        if options.unk_penalty:
            scores = torch.where(tokens == options.unk, scores - options.unk_penalty, scores)
        return scores.masked_fill_(scores.isnan() | (tokens == options.pad), -torch.inf)

    def _tokens_so_far(self, number: int) -> Tensor:
        """(rows, max_len + 2): what each row has fed, and padding."""
        step, rows = self.step, len(self.alive) * self.options.beams
        wide = step.tokens.new_full((rows, self.options.max_len + 2), self.options.pad)
        wide[:, : number + 1] = self._along_paths(step.tokens, number)
        return wide

    def _along_paths(self, history: Tensor, number: int) -> Tensor:
        step, rows = self.step, len(self.alive) * self.options.beams
        paths = torch.cat([step.key_rows[:rows, :number], step.slots[:rows, None]], 1).long()
        return history[paths, torch.arange(number + 1, device=step.device)]

    # --- between steps ---------------------------------------------------------------------------

    def make_room(self, tokens: int) -> None:
        """Lets the step grow if it is too small for `tokens`; the search goes on in its buffers."""
        step = self.step
        if tokens <= step.capacity:
            return
        most = in_blocks(self.options.max_len + 2)
        before = [*self.state()]
        held = (self.running_scores, self.ignored, self.places, self.ended, self.is_done)
        further = step.capacity + max(GROWTH, step.capacity // 2)
        step.grow(self.model, min(most, in_blocks(max(tokens, further))))
        filed = self.ended_scores, self.ended_lengths, before[-1]
        self._take_buffers()
        now = (self.running_scores, self.ignored, self.places, self.ended, self.is_done)
        for new, old in zip((*now, self.ended_scores, self.ended_lengths), (*held, *filed[:2]),
                            strict=True):  # fmt: skip
            new.copy_(old)
        self.ended_rows[:, :, : filed[2].shape[2]] = filed[2]

    def drop_done(self, is_done: list[int], exactly: bool) -> None:
        """Goes on without the sentences that are done: all of them, or until the batch has a size
        that others have too.
        """
        under_way = [at for at, place in enumerate(self.alive) if not is_done[place]]
        size = len(under_way)
        if not exactly:
            size = next((s for s in SIZES if s >= size), len(self.alive))
            if size > 3 * len(self.alive) // 4:
                return
        if not under_way or size >= len(self.alive):
            return
        kept = set(under_way)
        filler = [at for at in range(len(self.alive)) if at not in kept][: size - len(under_way)]
        chosen = sorted(under_way + filler)
        self.alive = [self.alive[at] for at in chosen]
        beams, device = self.options.beams, self.step.device
        index = torch.tensor(chosen, device=device)
        rows = (index[:, None] * beams + torch.arange(beams, device=device)).view(-1)
        self.step.keep_rows(rows)
        for state in (self.running_scores, self.ignored):
            state[: len(rows)] = state[rows]
        self.places[: len(index)] = self.places[index]
        self.order = self.order[index]

    # --- the end ---------------------------------------------------------------------------------

    def results(self) -> Ended:
        """Reads what has ended, along the slots that each hypothesis went through."""
        step, batch, beams = self.step, self.batch, self.options.beams
        counts = self.ended[:batch]
        there = torch.arange(beams, device=step.device) < counts[:, None]
        lengths = self.ended_lengths[:batch].masked_fill(~there, 0)
        numbers = torch.cat([counts, lengths.view(-1)]).tolist()
        longest = max(numbers[batch:], default=0)
        at = torch.arange(longest, device=step.device)
        # Places of all tokens: found once, for the host waits for them.
        used = (at < lengths[:, :, None]).view(-1).nonzero()[:, 0]
        paths = self.ended_rows[:batch, :, :longest].long()
        last = at == lengths[:, :, None] - 1
        # Token j was fed at position j + 1, but for the last, which nobody fed.
        fed = torch.cat([paths[:, :, 1:], paths[:, :, :1]], 2)
        behind = (at + 1).clamp(max=step.capacity - 1)
        tokens = step.tokens[fed, behind].masked_fill(last, self.options.eos)
        scores = self.ended_scores[:batch]
        sums = torch.where(last, scores[:, :, None], step.scores[fed, behind])
        positional = sums.clone()
        positional[:, :, 1:] -= sums[:, :, :-1]
        weights = None
        if step.weights is not None:
            weights = step.weights[paths.view(-1)[used], at.expand_as(paths).reshape(-1)[used]].t()
        lengths_used = [length for length in numbers[batch:] if length]
        return Ended(
            numbers[:batch],
            lengths_used,
            scores[there],
            tokens.view(-1)[used],
            positional.view(-1)[used],
            weights,
        )


def _prescribe(scores: Tensor, tokens: Tensor, pad: int) -> Tensor:
    """All but the prescribed token of a row at -inf; padding prescribes nothing."""
    only = torch.full_like(scores, -torch.inf)
    only.scatter_(1, tokens[:, None], scores.gather(1, tokens[:, None]))
    return torch.where((tokens != pad)[:, None], only, scores)


def search(
    step: SentenceStep,
    model: SentenceDecoder,
    options: SearchOptions,
    host: HostSearch,
    batch: int,
    seen: Sentences | None,
    prefix: Tensor | None,
) -> Ended:
    """Hypotheses of `batch` sentences; `prefix` (batch, any) is what they are made to begin with,
    padding where nothing is prescribed.
    """
    beams = options.beams
    sentences = batch
    if options.is_plain:
        sentences = min(filled_up(batch, step.device), step.rows // beams)
    step.begin(model, beams, batch, options.first, seen)
    run = Search(step, model, options, host, batch, sentences)
    first = 0
    prefix_len = 0 if prefix is None else min(prefix.shape[1], options.max_len)
    ends: list[bool] = []
    if prefix is not None and prefix_len:
        # In one look, for the device has nothing to do yet.
        found = [(prefix == token).any(0) for token in (options.eos, options.pad)]
        ends, lacks = torch.stack(found).tolist()
        if options.is_plain and seen is None:
            common = map(any, zip(ends[:prefix_len], lacks, strict=False))
            first = _begin_with(
                run, prefix, next((i for i, no in enumerate(common) if no), prefix_len)
            )
    looks: deque[tuple[Tensor, Any]] = deque()
    over, number = False, first
    # Drawing by the host must find the batch that its own loop would have.
    patient = runs_behind(step.device) and options.is_plain
    unseen = 0  # steps since the last look
    while number <= options.max_len and not over:
        steps = 1
        if patient and number >= prefix_len:
            steps = _steps_at_once(number, options.max_len - number)
        run.make_room(number + steps + 1)
        if options.is_plain and number >= prefix_len:
            run.run_plain(steps) if number < options.max_len else run.run_last()
        else:
            now = None
            if prefix is not None and number < prefix_len:
                now = prefix[run.order, number]
            run.run_in_torch(number, now, now is not None and ends[number])
        number, unseen = number + steps, unseen + steps
        if patient and unseen < _patience(number) and number <= options.max_len:
            continue
        unseen = 0
        looks.append((to_host(run.is_done), recorded(step.device)))
        while len(looks) > (1 if patient else 0) and not over:
            is_done, arrived = looks.popleft()
            if arrived is not None:
                arrived.synchronize()
            flags = is_done.tolist()
            over = all(flags[:batch])
            if not over:
                run.drop_done(flags, not patient)
    return run.results()


def _steps_at_once(number: int, left: int) -> int:
    for steps in STEPS:
        times = 1 if steps == STEPS[-1] else TIMES_LEFT
        if steps <= _patience(number) and times * steps <= left:
            return steps
    return 1


def _patience(number: int) -> int:
    """How many steps may pass between two looks: few beside those that there have been."""
    return min(max(STEPS[-1], number // 16), STEPS[0])


def runs_behind(device: torch.device) -> bool:
    """Whether what is queued runs later, so that the host need not wait to queue more."""
    return device.type == "cuda"


def filled_up(batch: int, device: torch.device) -> int:
    """How many sentences a step is run for."""
    if not runs_behind(device) or batch <= MULTIPLE_OF_FEW:
        return batch
    multiple = MULTIPLE_OF_FEW if batch <= FEW_SENTENCES else MULTIPLE_OF_MANY
    return (batch + multiple - 1) // multiple * multiple


def _begin_with(run: Search, prefix: Tensor, common: int) -> int:
    """Feeds the `common` first tokens of the prefixes, which are there in all sentences, in one
    pass, and scores them; returns how many there are.
    """
    options, step = run.options, run.step
    if common == 0:
        return 0
    run.make_room(common + 2)
    batch, beams = prefix.shape[0], options.beams
    first = torch.full_like(prefix[:, :1], options.first)
    fed = torch.cat([first, prefix[:, : common - 1]], 1)
    states = step.skip(run.model, beams, fed)
    targets = prefix[:, :common].reshape(-1)
    scores = torch.empty(len(targets), device=step.device)
    head_weight, head_bias = run.model.head_weight, run.model.head_bias
    # Products into rows that start on 16 bytes are several times as fast; what fills them up to
    # there is a token's logit that adds nothing to a softmax.
    width = -(-len(head_weight) // ALIGNED) * ALIGNED
    buffer = states.new_full((min(SCORED_ROWS, len(targets)), width), -torch.inf)
    for begin in range(0, len(targets), SCORED_ROWS):
        rows = slice(begin, begin + SCORED_ROWS)
        logits = buffer[: len(targets[rows])]
        product_into(logits[:, : len(head_weight)], states[rows], head_weight, head_bias)
        if options.temperature != 1.0:
            logits.div_(options.temperature)
        scores[rows] = run.scores_of(targets[rows], logits)
    sums = scores.view(batch, common).cumsum(1)
    slots = torch.arange(0, batch * beams, beams, device=step.device)
    step.tokens[slots, 1:common] = prefix[:, : common - 1]
    step.scores[slots, 1:common] = sums[:, :-1]
    everyone = torch.arange(batch * beams, device=step.device)
    step.tokens[everyone, common] = prefix[:, common - 1].repeat_interleave(beams)
    step.scores[everyone, common] = sums[:, -1].repeat_interleave(beams)
    step.input_ids[: batch * beams] = prefix[:, common - 1].repeat_interleave(beams)
    run.running_scores[: batch * beams : beams] = sums[:, -1]
    return common
