"""The scheduler, without a model: everybody gets on, long prompts delay nobody, and no slot is written twice."""

from hypothesis import given, settings
from hypothesis import strategies as st

from serve.engines.batching.cache import BlockPool
from serve.engines.batching.scheduler import Piece, Scheduler, Sequence

BLOCK_SIZE = 4


def make_scheduler(num_blocks=64, max_sequences=8, prompt_tokens_per_step=16, scores_per_step=100) -> Scheduler[str]:
    return Scheduler(BlockPool(num_blocks), BLOCK_SIZE, max_sequences, prompt_tokens_per_step, scores_per_step)


def make_sequence(num_prompt: int, max_tokens: int = 4, name: str = "", **fields) -> Sequence[str]:
    return Sequence(name, list(range(num_prompt)), num_prompt, max_tokens, **fields)


def run_step(scheduler: Scheduler[str]) -> list[Piece[str]]:
    """A step of a model that answers 0, 1, 2, ..."""
    pieces = scheduler.next_step()
    scheduler.complete(pieces)
    for piece in pieces:
        if piece.num_logit_rows:
            scheduler.verify(piece.sequence)
        if piece.samples:
            piece.sequence.token_ids.append(piece.sequence.num_answered)
        if piece.sequence.num_answered == piece.sequence.max_tokens and not piece.sequence.is_scoring:
            scheduler.remove(piece.sequence)
    return pieces


def run_all(scheduler: Scheduler[str], most_steps: int = 2000) -> list[list[Piece[str]]]:
    steps = []
    while scheduler.running or scheduler.waiting:
        steps.append(run_step(scheduler))
        assert len(steps) < most_steps, "the scheduler makes no progress"
    return steps


def test_a_long_prompt_does_not_stop_others():
    scheduler = make_scheduler()
    talking = [make_sequence(2, 30) for _ in range(3)]
    for sequence in talking:
        scheduler.add(sequence)
    run_step(scheduler)
    scheduler.add(make_sequence(100, 4))
    for step in range(1, 7):
        pieces = run_step(scheduler)
        assert [sequence.num_answered for sequence in talking] == [1 + step] * 3
        assert sum(piece.num_tokens for piece in pieces) == 3 + 16, "those who answer take nothing from the prompts"
    assert scheduler.running[-1].num_computed == 6 * 16


def test_short_prompts_wait_for_no_long_one_and_starve_none():
    scheduler = make_scheduler(max_sequences=30)
    long = make_sequence(100, 1, "long")
    scheduler.add(long)
    scheduler.add(make_sequence(60, 1, "longish"))
    scheduler.add(make_sequence(3, 1, "short"))
    run_step(scheduler)
    assert [sequence.owner for sequence in scheduler.running] == ["long", "longish"]  # the short one has its answer
    for _ in range(12):  # short ones keep coming
        before = long.num_computed
        scheduler.add(make_sequence(8, 1, "another"))
        assert sum(piece.num_tokens for piece in run_step(scheduler)) == 16
        assert long.num_computed - before >= 8 or long not in scheduler.running
    assert long not in scheduler.running


def test_requests_are_admitted_first_come_first_served():
    scheduler = make_scheduler(num_blocks=10, max_sequences=8)
    for name, num_prompt in (("first", 20), ("large", 30), ("small", 2)):
        scheduler.add(make_sequence(num_prompt, 2, name, adapter_digest=name))
    run_step(scheduler)
    assert [sequence.owner for sequence in scheduler.running] == ["first"], "a small one must not overtake a large one"
    run_step(scheduler)
    run_step(scheduler)
    run_step(scheduler)
    assert [sequence.owner for sequence in scheduler.running] == ["large", "small"]


def test_the_youngest_makes_room_and_keeps_its_answer():
    scheduler = make_scheduler(num_blocks=6, prompt_tokens_per_step=64)
    oldest, youngest = make_sequence(6, 12), make_sequence(6, 12)
    for sequence in (oldest, youngest):
        scheduler.add(sequence)
    answers = []
    while not scheduler.num_preemptions:
        run_step(scheduler)
        answers.append(list(youngest.token_ids))
    assert scheduler.running == [oldest]
    assert list(scheduler.waiting) == [youngest]
    assert youngest.token_ids == answers[-1] and youngest.num_answered > 0
    run_all(scheduler)
    assert youngest.token_ids == [*range(6), *range(12)] == oldest.token_ids


def test_a_cancelled_request_frees_its_blocks_running_or_waiting():
    scheduler = make_scheduler(num_blocks=8, max_sequences=1)
    first, second = make_sequence(20), make_sequence(20)
    scheduler.add(first)
    scheduler.add(second)
    run_step(scheduler)
    scheduler.remove(second)
    scheduler.remove(first)
    scheduler.remove(first)
    assert (scheduler.running, list(scheduler.waiting), scheduler.pool.num_used) == ([], [], 0)


def test_blocks_that_may_hold_what_is_not_finite_are_named_and_never_found():
    scheduler = make_scheduler(prompt_tokens_per_step=8)
    cancelled = make_sequence(20)
    scheduler.add(cancelled)
    scheduler.complete(scheduler.next_step())
    blocks = set(cancelled.blocks)
    scheduler.remove(cancelled)
    assert set(scheduler.unverified_blocks) == blocks
    again = make_sequence(20)
    scheduler.add(again)
    run_all(scheduler)
    assert again.num_cached == 0
    assert set(scheduler.unverified_blocks) == blocks, "those of a finished answer are finite"


def test_a_prefix_is_found_again_but_the_last_token_is_computed():
    scheduler = make_scheduler()
    for num_prompt, num_cached in ((12, 0), (12, 8), (14, 12), (3, 0)):
        sequence = make_sequence(num_prompt)
        scheduler.add(sequence)
        run_all(scheduler)
        assert sequence.num_cached == num_cached
    for other in (make_sequence(12, adapter_digest="a"), make_sequence(12, scores_prompt=True)):
        scheduler.add(other)
        run_all(scheduler)
        assert other.num_cached == 0, "other weights, or logits that were not kept"


class Simulation:
    """Checks each step against the promises. `slots` has what every slot of the cache holds."""

    def __init__(self, scheduler: Scheduler[str], budget: int) -> None:
        self.scheduler = scheduler
        self.budget = budget
        self.slots: dict[tuple[int, int], tuple] = {}
        self.scored: dict[Sequence[str], list[int]] = {}

    def step(self) -> list[Piece[str]]:
        scheduler = self.scheduler
        could_decode = {s for s in scheduler.running if s.num_computed == len(s.token_ids) - 1}
        preemptions = scheduler.num_preemptions
        pieces = scheduler.next_step()
        assert pieces, "a step without tokens"
        decoding = [piece for piece in pieces if piece.num_tokens == 1]
        assert pieces[: len(decoding)] == decoding, "rows of one token come first"
        extra = sum(piece.num_tokens for piece in pieces if piece.num_tokens > 1)
        assert extra <= self.budget
        if scheduler.pool.num_available and preemptions == scheduler.num_preemptions:
            assert could_decode <= {piece.sequence for piece in pieces}, "everybody who answers gets a token"
        assert len({piece.sequence for piece in pieces}) == len(pieces) <= 8
        self.write(pieces)
        for piece in pieces:
            self.attend(piece)
        return pieces

    def write(self, pieces) -> None:
        written = set()
        for piece in pieces:
            sequence = piece.sequence
            for token in range(piece.start, piece.end):
                slot = (sequence.blocks[token // BLOCK_SIZE], token % BLOCK_SIZE)
                assert slot not in written, "two sequences write one slot"
                written.add(slot)
                self.slots[slot] = (sequence.adapter_digest, *sequence.token_ids[: token + 1])

    def attend(self, piece) -> None:
        sequence = piece.sequence
        for token in range(piece.end):
            slot = (sequence.blocks[token // BLOCK_SIZE], token % BLOCK_SIZE)
            expected = (sequence.adapter_digest, *sequence.token_ids[: token + 1])
            assert self.slots[slot] == expected, "keys and values are of other tokens, or other weights"
        last_scored = piece.end - piece.samples
        rows = range(last_scored - piece.num_scores, last_scored)
        assert rows.start >= piece.start
        self.scored.setdefault(sequence, []).extend(token + 1 for token in rows)


requests = st.fixed_dictionaries(
    {
        "num_prompt": st.integers(1, 30),
        "max_tokens": st.integers(0, 10),
        "adapter_digest": st.sampled_from([None, "a", "b"]),
        "scores_prompt": st.booleans(),
    }
)


@given(
    crowd=st.lists(st.tuples(requests, st.integers(0, 6), st.none() | st.integers(1, 12)), min_size=1, max_size=10),
    num_blocks=st.integers(10, 40),
    budget=st.integers(1, 40),
    scores=st.integers(1, 20),
)
@settings(max_examples=300, deadline=None)
def test_every_promise_holds_in_every_step(crowd, num_blocks, budget, scores):
    scheduler = make_scheduler(num_blocks, 8, budget, scores)
    simulation = Simulation(scheduler, budget)
    arriving = [(make_sequence(**request), wait, leaves) for request, wait, leaves in crowd]
    finished = []
    cancelled = set()
    for step in range(3000):
        for sequence, wait, leaves in arriving:
            if wait == step and (sequence.max_tokens or sequence.is_scoring):
                scheduler.add(sequence)
            if leaves is not None and wait + leaves == step:
                scheduler.remove(sequence)
                cancelled.add(sequence)
        scheduler.unverified_blocks.clear()
        if not (scheduler.running or scheduler.waiting):
            if step > 20:
                break
            continue
        pieces = simulation.step()
        scheduler.complete(pieces)
        for piece in pieces:
            sequence = piece.sequence
            if piece.num_logit_rows:
                scheduler.verify(sequence)
            if piece.samples:
                sequence.token_ids.append(1000 + sequence.num_answered)
            if sequence.num_answered == sequence.max_tokens and not sequence.is_scoring:
                scheduler.remove(sequence)
                finished.append(sequence)
    else:
        raise AssertionError("the scheduler makes no progress")
    assert scheduler.pool.num_used == 0
    for sequence, _, _ in arriving:
        if sequence in cancelled or not (sequence.max_tokens or sequence.is_scoring or sequence in finished):
            continue
        assert sequence.num_answered == sequence.max_tokens
        if sequence.scores_prompt:
            assert simulation.scored.get(sequence, []) == list(range(1, sequence.num_prompt)), "each is scored once"
