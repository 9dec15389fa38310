"""Which tokens go into the next step. Pure Python: knows no tensors, no text and no threads.

A step has one token of every decoding sequence, and pieces of prompts within a budget of tokens, so that a long prompt
delays the others by no more than that budget. It is the same however many sequences decode: if they used it up, few
prompts would join a nearly full batch, and its places would stay empty. Of the budget the oldest prompt gets at least
half, and the shortest of the others the rest: no prompt waits for a longer one to end, and none for ever.

Sequences are admitted first come, first served, with room for their whole prompt. When a decoding sequence needs a
block and there is none, the youngest sequence gives all of its own back: it waits at the head of the queue with the
answer it has, and computes its keys and values again later.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from serve.engines.batching.cache import BlockKey, BlockPool, first_key, next_key

Owner = TypeVar("Owner")


@dataclass(eq=False)
class Sequence(Generic[Owner]):
    """A prompt and its answer so far."""

    owner: Owner
    """Whatever the engine needs to know of it."""
    token_ids: list[int]
    """Of prompt and answer."""
    num_prompt: int
    max_tokens: int
    adapter_digest: str | None = None
    scores_prompt: bool = False
    """Whether the logits of all prompt tokens are needed, not only of the last."""

    num_computed: int = 0
    """Tokens whose keys and values are in the cache."""
    num_verified: int = 0
    """Of these, tokens up to the last one with finite logits."""
    num_scored: int = 1
    """Prompt tokens with a log-probability. The first never has one: nothing is before it."""
    num_cached: int | None = None
    """Prompt tokens found in the prefix cache when first admitted; None before."""
    blocks: list[int] = field(default_factory=list)
    keys: list[BlockKey] = field(default_factory=list)
    """Of its full blocks; as many as were needed so far."""
    num_published: int = 0
    arrival: int = 0

    @property
    def num_wanted(self) -> int:
        """Tokens to compute. Nothing follows a prompt that is only scored, so its last token is not needed."""
        return len(self.token_ids) if self.max_tokens else self.num_prompt - 1

    @property
    def num_answered(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def is_scoring(self) -> bool:
        return self.scores_prompt and self.num_scored < self.num_prompt


@dataclass(frozen=True)
class Piece(Generic[Owner]):
    """Consecutive tokens of one sequence in a step."""

    sequence: Sequence[Owner]
    start: int
    num_tokens: int
    num_scores: int
    """Prompt tokens that the logits of the piece's last tokens score; those before the very last, if it `samples`."""
    samples: bool
    """Whether the last token's logits choose the sequence's next token."""

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def num_logit_rows(self) -> int:
        """Its last so many tokens need logits."""
        return self.num_scores + self.samples


class Scheduler(Generic[Owner]):
    """Sequences that wait, sequences in the batch, and their blocks."""

    def __init__(
        self, pool: BlockPool, block_size: int, max_sequences: int, prompt_tokens_per_step: int, scores_per_step: int
    ) -> None:
        """`scores_per_step` bounds the rows of logits that score prompts: each is as wide as the vocabulary."""
        self.pool = pool
        self.block_size = block_size
        self.waiting: deque[Sequence[Owner]] = deque()
        self.running: list[Sequence[Owner]] = []
        """In the order of their arrival."""
        self.num_preemptions = 0
        self.unverified_blocks: list[int] = []
        """Free blocks whose content may not be finite. Whoever owns the tensors overwrites and removes them before the
        next step: a masked slot with NaN still makes a weighted sum NaN."""
        self._max_sequences = max_sequences
        self._prompt_tokens_per_step = prompt_tokens_per_step
        self._scores_per_step = scores_per_step
        self._num_arrived = 0

    @property
    def max_tokens(self) -> int:
        """Tokens of prompt and answer that the longest possible sequence has; its last is never in the cache."""
        return self.pool.num_blocks * self.block_size + 1

    def add(self, sequence: Sequence[Owner]) -> None:
        """Queue a new sequence, which must not be longer than `max_tokens`."""
        sequence.arrival = self._num_arrived
        self._num_arrived += 1
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence[Owner]) -> None:
        """Take a sequence out, finished or not. One that is not here is no error."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._give_back(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def next_step(self) -> list[Piece[Owner]]:
        """Decoding sequences first, then pieces of prompts; empty if there is nothing to compute."""
        self._admit()
        decoding = [sequence for sequence in self.running if sequence.num_computed == len(sequence.token_ids) - 1]
        # Oldest first: making room takes blocks of younger ones only, which then have none.
        pieces = [self._piece(sequence, 1, 1) for sequence in decoding if self._has_room(sequence)]
        in_step = set(decoding)
        prompts = [sequence for sequence in self.running if sequence not in in_step]
        pieces += self._prompt_pieces(prompts, self._prompt_tokens_per_step)
        # Neighbours with one adapter are one run of rows.
        pieces.sort(key=lambda piece: (piece.num_tokens > 1, piece.sequence.adapter_digest or ""))
        return pieces

    def complete(self, pieces: Iterable[Piece[Owner]]) -> None:
        """The keys and values of these pieces are in the cache."""
        for piece in pieces:
            piece.sequence.num_computed = piece.end
            piece.sequence.num_scored += piece.num_scores

    def verify(self, sequence: Sequence[Owner]) -> None:
        """The logits of the last token computed are finite, so all before it are. Makes full blocks findable."""
        sequence.num_verified = sequence.num_computed
        num_full = sequence.num_computed // self.block_size
        if num_full > sequence.num_published:
            self._extend_keys(sequence, num_full)
            for index in range(sequence.num_published, num_full):
                self.pool.publish(sequence.blocks[index], sequence.keys[index])
            sequence.num_published = num_full

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self._max_sequences:
            sequence = self.waiting[0]
            keys = self._usable_keys(sequence)
            num_found, num_unused = self.pool.count_found(keys)
            num_new = -(-sequence.num_wanted // self.block_size) - num_found
            # One block more for each that decodes, or what is admitted now would soon have to make room again.
            if self.running and num_new + num_unused + len(self.running) > self.pool.num_available:
                return
            self.waiting.popleft()
            sequence.blocks = self.pool.share(keys[:num_found])
            sequence.blocks += self.pool.allocate(num_new)
            sequence.num_computed = sequence.num_verified = num_found * self.block_size
            sequence.num_published = num_found
            if sequence.num_cached is None:
                sequence.num_cached = sequence.num_computed
            self._insert_running(sequence)

    def _usable_keys(self, sequence: Sequence[Owner]) -> list[BlockKey]:
        """Keys of blocks that need no computing. The last token needs it, and all whose logits are yet to score one."""
        usable_tokens = sequence.num_scored - 1 if sequence.is_scoring else sequence.num_wanted - 1
        num_blocks = usable_tokens // self.block_size
        self._extend_keys(sequence, num_blocks)
        return sequence.keys[:num_blocks]

    def _insert_running(self, sequence: Sequence[Owner]) -> None:
        index = len(self.running)
        while index and self.running[index - 1].arrival > sequence.arrival:
            index -= 1
        self.running.insert(index, sequence)

    def _has_room(self, sequence: Sequence[Owner]) -> bool:
        """Give a decoding sequence the block for its next token, if need be from younger ones."""
        if not sequence.blocks:
            return False
        if sequence.num_computed < len(sequence.blocks) * self.block_size:
            return True
        while not self.pool.num_available:
            youngest = self.running[-1]
            if youngest is sequence:
                return False  # keeps its blocks, and goes on once an older one ends
            self._preempt(youngest)
        sequence.blocks += self.pool.allocate(1)
        return True

    def _preempt(self, sequence: Sequence[Owner]) -> None:
        self.running.remove(sequence)
        self._give_back(sequence)
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _give_back(self, sequence: Sequence[Owner]) -> None:
        freed = self.pool.release(sequence.blocks)
        if sequence.num_verified < sequence.num_computed:
            self.unverified_blocks += freed
        sequence.blocks = []
        sequence.num_computed = 0
        sequence.num_verified = 0
        sequence.num_published = 0

    def _piece(self, sequence: Sequence[Owner], max_tokens: int, max_scores: int) -> Piece[Owner]:
        start = sequence.num_computed
        end = min(sequence.num_wanted, start + max_tokens)
        num_scores = 0
        if sequence.is_scoring:
            # The logits of token i score token i + 1.
            first = max(start, sequence.num_scored - 1)
            end = min(end, first + max_scores)
            num_scores = max(min(end, sequence.num_prompt - 1) - first, 0)
        samples = sequence.max_tokens > 0 and end == len(sequence.token_ids)
        return Piece(sequence, start, max(end - start, 0), num_scores, samples and end > start)

    def _prompt_pieces(self, prompts: list[Sequence[Owner]], tokens: int) -> Iterator[Piece[Owner]]:
        """Pieces of at most `tokens` tokens in all; `prompts` are in the order of their arrival."""
        if not prompts:
            return
        oldest, *others = prompts
        scores = self._scores_per_step
        needed = oldest.num_wanted - oldest.num_computed
        for_others = max(tokens // 2, tokens - needed)
        scores_for_others = scores // 2 if oldest.is_scoring else scores
        for sequence in sorted(others, key=lambda each: each.num_wanted - each.num_computed):
            piece = self._piece(sequence, for_others, scores_for_others)
            if piece.num_tokens:
                yield piece
                tokens -= piece.num_tokens
                for_others -= piece.num_tokens
                scores -= piece.num_scores
                scores_for_others -= piece.num_scores
        piece = self._piece(oldest, tokens, scores)
        if piece.num_tokens:
            yield piece

    def _extend_keys(self, sequence: Sequence[Owner], count: int) -> None:
        keys = sequence.keys
        before = keys[-1] if keys else first_key(sequence.adapter_digest)
        for index in range(len(keys), count):
            begin = index * self.block_size
            before = next_key(before, sequence.token_ids[begin : begin + self.block_size])
            keys.append(before)
