"""Encoded rows and their batches: every row once, no matter how many ranks or restarts."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import learnable

from mope.training.batches import ENCODE_CHUNK, MAX_REPEATS, BucketLoader, EncodedRows, encode_rows


def encoded(num_rows, seed=0):
    """Rows of random ids; the first id of each row is its position."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 30, num_rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    flat = rng.integers(1, 100, offsets[-1]).astype(np.int32)
    flat[offsets[:-1]] = np.arange(num_rows)
    return EncodedRows(
        flat_ids=flat,
        offsets=offsets,
        numbers_RF=rng.random((num_rows, 3), dtype=np.float32),
        llm_R=rng.integers(0, 3, num_rows),
        rule_hits=[None] * num_rows,
        tokens_R=np.arange(num_rows) + 1,
        censored_R=rng.random(num_rows) < 0.2,
        pad_id=0,
    )


def seen(batches):
    return [int(row) for batch in batches for row in batch["input_ids_BS"][:, 0]]


sizes = st.integers(1, 120), st.integers(1, 17), st.integers(1, 5), st.integers(0, 3)


@settings(max_examples=60)
@given(*sizes, st.booleans())
def test_every_row_comes_once_an_epoch(num_rows, batch_size, pool, seed, shuffle):
    loader = BucketLoader(encoded(num_rows), batch_size, seed=seed, pool_batches=pool, shuffle=shuffle)
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == len(loader) == -(-num_rows // batch_size)
        assert sorted(seen(batches)) == list(range(num_rows))


@settings(max_examples=60)
@given(*sizes, st.integers(1, 4), st.integers(0, 5))
def test_ranks_share_the_rows_without_overlap(num_rows, batch_size, pool, seed, world_size, epoch):
    rows = encoded(num_rows)
    shares = [
        BucketLoader(rows, batch_size, seed=seed, pool_batches=pool, rank=rank, world_size=world_size).batches(epoch)
        for rank in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1  # else ranks would wait for each other for ever
    taken = [row for share in shares for batch in share for row in batch.tolist()]
    assert len(taken) == len(set(taken))
    num_batches = -(-num_rows // batch_size)
    assert sum(map(len, shares)) == num_batches - num_batches % world_size


def test_ranks_together_see_every_row_where_batches_divide():
    rows = encoded(96)
    shares = [BucketLoader(rows, 8, rank=rank, world_size=3).batches(0) for rank in range(3)]
    assert sorted(row for share in shares for batch in share for row in batch) == list(range(96))


def test_validation_goes_by_length_on_every_rank():
    rows = encoded(50)
    plans = [BucketLoader(rows, 8, shuffle=False, rank=rank, world_size=2).batches(3) for rank in range(2)]
    for plan in plans:
        assert np.concatenate(plan).tolist() == np.argsort(rows.lengths, kind="stable").tolist()


@settings(max_examples=40)
@given(*sizes, st.integers(0, 40))
def test_a_restored_loader_gives_exactly_the_remaining_rows(num_rows, batch_size, pool, seed, num_seen):
    def loader():
        return BucketLoader(encoded(num_rows), batch_size, seed=seed, pool_batches=pool)

    whole = loader()
    order = [seen([batch]) for _ in range(5) for batch in whole]
    num_seen = min(num_seen, 3 * len(whole))
    interrupted, done = loader(), []
    while len(done) < num_seen:
        for batch in interrupted:
            done.append(seen([batch]))
            if len(done) == num_seen:
                break
    restored = loader()
    restored.load_state_dict(interrupted.state_dict())
    rest = [seen([batch]) for batch in restored]  # to the end of the epoch
    assert done + rest == order[: num_seen + len(rest)]
    assert (num_seen + len(rest)) % len(whole) == 0
    following = [seen([batch]) for batch in restored]
    assert following == order[num_seen + len(rest) :][: len(whole)]


def test_order_follows_from_seed_and_epoch_alone():
    rows = encoded(200)

    def order(seed, epoch):
        return [batch.tolist() for batch in BucketLoader(rows, 8, seed=seed).batches(epoch)]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_pools_save_padding_and_a_pool_of_one_batch_does_not_sort():
    rows = encoded(2000)

    def padding(pool):
        return sum(
            rows.lengths[batch].max() * len(batch) for batch in BucketLoader(rows, 16, pool_batches=pool).batches(0)
        )

    assert padding(50) < 1.1 * rows.lengths.sum()
    assert padding(1) > 1.6 * rows.lengths.sum()


def test_a_batch_is_padded_to_its_longest_row_and_a_little_more():
    rows = encoded(20)
    picked = np.array([3, 11, 7])
    batch = rows.batch(picked)
    width, longest = batch["input_ids_BS"].shape[1], rows.lengths[picked].max()
    assert width % 8 == 0
    assert longest <= width < longest + 8
    for position, row in enumerate(picked):
        own = rows.flat_ids[rows.offsets[row] : rows.offsets[row + 1]].tolist()
        assert batch["input_ids_BS"][position, : len(own)].tolist() == own
        assert batch["attention_mask_BS"][position].tolist() == [1] * len(own) + [0] * (
            batch["input_ids_BS"].shape[1] - len(own)
        )
    assert batch["tokens_BD"].tolist() == [[4.0], [12.0], [8.0]]
    assert batch["numbers_BF"].numpy().tolist() == rows.numbers_RF[picked].tolist()
    assert batch["censored_B"].tolist() == rows.censored_R[picked].tolist()


@given(st.lists(st.integers(0, 29), max_size=12))
def test_taking_rows_keeps_everything_of_them(picked):
    rows = encoded(30)
    taken = rows.take(np.array(picked, dtype=np.int64))
    assert len(taken) == len(picked)
    assert taken.requests(np.arange(len(picked))).token_ids == rows.requests(np.array(picked, dtype=int)).token_ids
    assert taken.tokens_R.tolist() == [row + 1 for row in picked]
    assert taken.llm_R.tolist() == rows.llm_R[picked].tolist() if picked else len(taken.llm_R) == 0


def test_rows_in_batches_by_length_are_complete():
    rows = encoded(100)
    batches = rows.by_length(16)
    assert sorted(np.concatenate(batches)) == list(range(100))
    assert np.all(np.diff(rows.lengths[np.concatenate(batches)]) >= 0)


def test_rows_are_encoded_in_chunks_without_a_seam(predictor, monkeypatch):
    table = learnable(25)
    whole = encode_rows(table, predictor.encoder, "encoding")
    monkeypatch.setattr("mope.training.batches.ENCODE_CHUNK", 4)
    pieces = encode_rows(table, predictor.encoder, "encoding")
    assert ENCODE_CHUNK > 25
    assert np.array_equal(whole.flat_ids, pieces.flat_ids)
    assert np.array_equal(whole.offsets, pieces.offsets)
    assert np.array_equal(whole.numbers_RF, pieces.numbers_RF)
    assert whole.rule_hits == pieces.rule_hits
    assert whole.tokens_R.tolist() == table.response_tokens.tolist()


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_last_batch_may_be_smaller(shuffle):
    batches = BucketLoader(encoded(9), 4, shuffle=shuffle).batches(0)
    assert sorted(map(len, batches)) == [1, 4, 4]


def shared_texts():
    """Six texts; the first two are answered by three LLMs, the second of them twice by the last."""
    texts = [[7, 8], [7, 8], [7, 8], [9], [9], [9], [9], [1, 2, 3], [4], [5, 6], [7, 8, 9]]
    llms = [1, 2, 3, 1, 2, 3, 3, 0, 0, 0, 0]
    return EncodedRows(
        flat_ids=np.concatenate(texts).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum([len(text) for text in texts])]),
        numbers_RF=np.arange(len(texts), dtype=np.float32)[:, None],
        llm_R=np.array(llms),
        rule_hits=[None] * len(texts),
        tokens_R=np.arange(len(texts)) + 1,
        censored_R=np.zeros(len(texts), bool),
        pad_id=0,
    )


def test_a_text_that_several_llms_answered_is_one_and_comes_with_all_its_rows():
    rows = shared_texts()
    assert rows.text_R.tolist() == [0, 0, 0, 1, 1, 1, 2, 3, 4, 5, 6]  # the second answer of one LLM stands alone
    assert rows.num_texts == 7
    for shuffle in (True, False):
        batches = BucketLoader(rows, 2, shuffle=shuffle, pool_batches=2).batches(0)
        assert sorted(np.concatenate(batches)) == list(range(len(rows)))
        assert [len(np.unique(rows.text_R[batch])) for batch in batches].count(2) == 3
        for batch in batches:
            others = np.setdiff1d(np.arange(len(rows)), batch)
            assert not set(rows.text_R[batch]) & set(rows.text_R[others])


def test_answers_of_one_llm_to_the_same_request_are_one_text_up_to_a_limit():
    rows = shared_texts()
    again = replace(
        rows.take(np.array([3] * (MAX_REPEATS + 1))), numbers_RF=np.ones((MAX_REPEATS + 1, 1), dtype=np.float32)
    )
    assert again.text_R.tolist() == [0] * MAX_REPEATS + [1]
    after_other_turns = replace(again, numbers_RF=np.arange(len(again), dtype=np.float32)[:, None])
    assert after_other_turns.text_R.tolist() == list(range(len(again)))


def test_text_positions_of_a_batch_point_to_equal_texts():
    rows = shared_texts()
    batch = rows.batch(np.array([4, 0, 7, 1, 3]))
    assert batch["text_B"].tolist() == [1, 0, 2, 0, 1]
    for row, text in enumerate(batch["text_B"].tolist()):
        first = batch["text_B"].tolist().index(text)
        assert batch["input_ids_BS"][row].tolist() == batch["input_ids_BS"][first].tolist()


@settings(max_examples=60)
@given(*sizes, st.lists(st.sampled_from([0.1, 0.34, 1.0]), min_size=1, max_size=3))
def test_texts_of_which_a_share_comes_in_an_epoch_come_equally_often(num_rows, batch_size, pool, seed, shares):
    keep = np.resize(np.array(shares), num_rows)
    rows = replace(encoded(num_rows), keep_R=keep)
    loader = BucketLoader(rows, batch_size, seed=seed, pool_batches=pool)
    times = Counter(int(row) for epoch in range(100) for batch in loader.batches(epoch) for row in batch)
    for share in set(keep.tolist()):
        seen_times = [times[row] for row in np.flatnonzero(keep == share)]
        assert max(seen_times) - min(seen_times) <= 1
        expected = min(1.0, max(1, round(len(seen_times) * share)) / len(seen_times))
        assert np.mean(seen_times) == pytest.approx(100 * expected)
    assert len({len(loader.batches(epoch)) for epoch in range(5)}) == 1  # the schedule counts on it
