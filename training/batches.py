"""Encoded rows and the batches made of them: rows of like length together, little padding.

Knows arrays and order; does not know what is trained on them. All order follows from the seed and the epoch.

Shape suffixes: R rows, B rows of a batch, S tokens, F numbers, D draws, K experts, N bins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mope.console import progress
from mope.features import EncodedRequests, RequestEncoder
from mope.grid import Array
from mope.rules import RuleHits
from mope.training.data.table import RowTable

ENCODE_CHUNK = 2048
MAX_REPEATS = 8  # answers of one LLM to one request that count as one text's
WIDTH_STEP = 8  # batches are padded to a multiple of this: few shapes, so that kernels built for one serve again


@dataclass(frozen=True)
class Targets:
    """What a teacher says of each row; NaN where it says nothing.

    Attributes:
        log_mix_RN: log probability of each bin in its mixture, float16.
        log_gate_RK: log probability of each expert by its gate, float16.
    """

    log_mix_RN: Array
    log_gate_RK: Array

    def take(self, rows: Array) -> Targets:
        """The rows at the given positions."""
        return Targets(self.log_mix_RN[rows], self.log_gate_RK[rows])


@dataclass(frozen=True)
class EncodedRows:
    """Rows as the network reads them, tokens of all rows in one flat array.

    Attributes:
        flat_ids: token ids of all rows one after the other, int32.
        offsets: where each row begins in `flat_ids`, shape (R + 1,).
        numbers_RF: raw numbers, float32.
        llm_R: target LLM index.
        rule_hits: one per row.
        tokens_R: labels, response tokens.
        censored_R: True where the answer hit a cap.
        pad_id: the encoder's padding token.
        targets: what a teacher says of the rows, if there is one.
        draws_RD: where an LLM was asked several times, its answers in tokens, float32, NaN where there are fewer;
            None: one answer a row, its label.
        weight_R: how much each row counts, see `mope.training.balance`; None: all alike.
        scale_R: tokens that each row's CRPS is divided by; None: the mean label.
        keep_R: share of the epochs in which each row's text comes; None: it comes in each.
    """

    flat_ids: Array
    offsets: Array
    numbers_RF: Array
    llm_R: Array
    rule_hits: list[RuleHits]
    tokens_R: Array
    censored_R: Array
    pad_id: int
    targets: Targets | None = None
    draws_RD: Array | None = None
    weight_R: Array | None = None
    scale_R: Array | None = None
    keep_R: Array | None = None

    def __len__(self) -> int:
        return len(self.tokens_R)

    @property
    def lengths(self) -> Array:
        """Input tokens per row, shape (R,)."""
        return np.diff(self.offsets)

    @cached_property
    def text_R(self) -> Array:
        """Which text each row has, shape (R,): the same for answers of several LLMs to one text, else one for each.

        Answers of one LLM to the same request are together, too, up to `MAX_REPEATS`; but a text that comes a
        thousand times ("continue") after other turns stays apart, so that it does not end up in one batch.
        """
        texts: dict[tuple[bytes, int], int] = {}
        taken: Counter[tuple[bytes, int]] = Counter()
        places: dict[tuple[bytes, int, bytes], list[int]] = {}
        found = np.empty(len(self), dtype=np.int64)
        for row, llm in enumerate(self.llm_R.tolist()):
            text = self.flat_ids[self.offsets[row] : self.offsets[row + 1]].tobytes()
            request = (text, llm, self.numbers_RF[row].tobytes())
            place = places.get(request)
            if place is None or place[1] == MAX_REPEATS:
                place = places[request] = [taken[text, llm], 0]
                taken[text, llm] += 1
            place[1] += 1
            found[row] = texts.setdefault((text, place[0]), len(texts))
        return found

    @property
    def num_texts(self) -> int:
        """How many texts come in an epoch, see `text_R` and `keep_R`."""
        return BucketLoader(self, 1).num_texts

    def take(self, rows: Array) -> EncodedRows:
        """The rows at the given positions."""
        return EncodedRows(
            flat_ids=np.concatenate([self.flat_ids[self.offsets[r] : self.offsets[r + 1]] for r in rows])
            if len(rows)
            else self.flat_ids[:0],
            offsets=np.concatenate([[0], np.cumsum(self.lengths[rows])]),
            numbers_RF=self.numbers_RF[rows],
            llm_R=self.llm_R[rows],
            rule_hits=[self.rule_hits[r] for r in rows],
            tokens_R=self.tokens_R[rows],
            censored_R=self.censored_R[rows],
            pad_id=self.pad_id,
            targets=None if self.targets is None else self.targets.take(rows),
            draws_RD=None if self.draws_RD is None else self.draws_RD[rows],
            weight_R=None if self.weight_R is None else self.weight_R[rows],
            scale_R=None if self.scale_R is None else self.scale_R[rows],
            keep_R=None if self.keep_R is None else self.keep_R[rows],
        )

    def requests(self, rows: Array) -> EncodedRequests:
        """Some rows in the form that a serving backend reads."""
        return EncodedRequests(
            token_ids=[self.flat_ids[self.offsets[r] : self.offsets[r + 1]].tolist() for r in rows],
            numbers_BF=self.numbers_RF[rows],
            llm_B=self.llm_R[rows],
            rule_hits=[self.rule_hits[r] for r in rows],
        )

    def by_length(self, batch_size: int) -> list[Array]:
        """Row positions in batches of like length, rows of one text together."""
        order = np.lexsort((self.text_R, self.lengths))
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    def batch(self, rows: Array) -> dict[str, Tensor]:
        """Tensors of some rows, padded to the longest among them, or a little more."""
        lengths = self.lengths[rows]
        mask_BS = np.arange(padded_width(lengths.max())) < lengths[:, None]
        ids_BS = np.full(mask_BS.shape, self.pad_id, dtype=np.int64)
        ids_BS[mask_BS] = np.concatenate([self.flat_ids[self.offsets[r] : self.offsets[r + 1]] for r in rows])
        taught = {}
        if self.targets is not None:
            targets = self.targets.take(rows)
            taught = {"teacher_mix_BN": targets.log_mix_RN, "teacher_gate_BK": targets.log_gate_RK}
        texts, text_B = np.unique(self.text_R[rows], return_inverse=True)
        tokens_B = self.tokens_R[rows].astype(np.float32)
        tokens_BD = tokens_B[:, None] if self.draws_RD is None else self.draws_RD[rows]
        weight_B = np.full(len(rows), 1 / len(rows)) if self.weight_R is None else self.weight_R[rows] / len(texts)
        scale_B = np.full(len(rows), self.tokens_R.mean()) if self.scale_R is None else self.scale_R[rows]
        return {
            **{name: torch.from_numpy(array.astype(np.float32)) for name, array in taught.items()},
            "input_ids_BS": torch.from_numpy(ids_BS),
            "attention_mask_BS": torch.from_numpy(mask_BS.astype(np.int64)),
            "numbers_BF": torch.from_numpy(self.numbers_RF[rows]),
            "llm_B": torch.from_numpy(self.llm_R[rows]),
            "text_B": torch.from_numpy(text_B),
            "tokens_BD": torch.from_numpy(tokens_BD),
            "censored_B": torch.from_numpy(self.censored_R[rows]),
            "weight_B": torch.from_numpy(weight_B.astype(np.float32)),
            "scale_B": torch.from_numpy(scale_B.astype(np.float32)),
            "num_weighed": torch.tensor(len(rows) if self.weight_R is None else len(texts)),
        }


def padded_width(length: int) -> int:
    """`length`, rounded up to a multiple of `WIDTH_STEP`."""
    return -(-int(length) // WIDTH_STEP) * WIDTH_STEP


def encode_rows(table: RowTable, encoder: RequestEncoder, description: str) -> EncodedRows:
    """Encode a table in chunks, with a progress bar."""
    ids: list[Array] = []
    lengths: list[Array] = []
    numbers: list[Array] = []
    llms: list[Array] = []
    hits: list[RuleHits] = []
    with progress(description, total=len(table)) as advance:
        for start in range(0, len(table), ENCODE_CHUNK):
            chunk = table.take(np.arange(start, min(start + ENCODE_CHUNK, len(table))))
            encoded = encoder.encode(chunk.requests())
            ids.append(np.concatenate([np.asarray(row, dtype=np.int32) for row in encoded.token_ids]))
            lengths.append(np.array([len(row) for row in encoded.token_ids]))
            numbers.append(encoded.numbers_BF)
            llms.append(encoded.llm_B)
            hits.extend(encoded.rule_hits)
            advance(len(chunk))
    return EncodedRows(
        flat_ids=np.concatenate(ids),
        offsets=np.concatenate([[0], np.cumsum(np.concatenate(lengths))]),
        numbers_RF=np.concatenate(numbers),
        llm_R=np.concatenate(llms),
        rule_hits=hits,
        tokens_R=table.response_tokens,
        censored_R=table.censored,
        pad_id=encoder.pad_id,
        draws_RD=table.draws,
    )


class BucketLoader:
    """Batches of texts of like length, in an order that follows from seed and epoch.

    Where the rows say so, only a share of the texts comes in an epoch, all of them in turn. Texts are shuffled, cut
    into pools of `pool_batches` batches, sorted by length within a pool, and the batches shuffled. A text comes with
    all its rows, which are more than one where several LLMs answered it. Each rank of a distributed run takes every
    `world_size`-th batch. The position within an epoch is saved and restored, so a run that was killed goes on with
    the rows it had not seen.

    Args:
        rows: what to draw from.
        batch_size: texts per batch and rank.
        seed: fixes the order.
        shuffle: False goes through the rows by length, for validation.
        pool_batches: batches that are sorted together; 1 keeps batches random.
        rank: this process among `world_size`.
        world_size: processes that share the rows.
    """

    def __init__(
        self,
        rows: EncodedRows,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        pool_batches: int = 50,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._rows, self._batch_size, self._seed, self._shuffle = rows, batch_size, seed, shuffle
        self._pool, self._rank, self._world_size = pool_batches * batch_size, rank, world_size
        self._epoch = 0
        self._next = 0
        by_text = np.argsort(rows.text_R, kind="stable")
        starts = np.flatnonzero(np.diff(rows.text_R[by_text], prepend=-1))
        self._texts: list[Array] = np.split(by_text, starts[1:])  # rows of each text
        self._lengths = rows.lengths[by_text[starts]]
        keep_T = np.ones(len(starts)) if rows.keep_R is None or not shuffle else rows.keep_R[by_text[starts]]
        rng = np.random.default_rng(seed)
        self._shares = [(rng.permutation(np.flatnonzero(keep_T == keep)), float(keep)) for keep in np.unique(keep_T)]

    @property
    def num_texts(self) -> int:
        """Texts of an epoch, of all ranks."""
        return sum(_share_of(len(texts), keep) for texts, keep in self._shares)

    def __len__(self) -> int:
        batches = -(-self.num_texts // self._batch_size)
        return batches // self._world_size if self._shuffle and self._world_size > 1 else batches

    def batches(self, epoch: int) -> list[Array]:
        """Row positions of each of this rank's batches in an epoch."""
        rng = np.random.default_rng([self._seed, epoch])
        order = rng.permutation(self._of_epoch(epoch)) if self._shuffle else np.arange(len(self._texts))
        pool_size = self._pool if self._shuffle else max(len(order), 1)
        batches: list[Array] = []
        for start in range(0, len(order), pool_size):
            pool = order[start : start + pool_size]
            pool = pool[np.argsort(self._lengths[pool], kind="stable")]
            for i in range(0, len(pool), self._batch_size):
                batches.append(np.concatenate([self._texts[text] for text in pool[i : i + self._batch_size]]))
        if not self._shuffle:
            return batches
        mixed = [batches[i] for i in rng.permutation(len(batches))]
        return [mixed[i] for i in range(self._rank, len(self) * self._world_size, self._world_size)]

    def _of_epoch(self, epoch: int) -> Array:
        """The texts that come in an epoch: of each share the next ones, from its beginning again at its end."""
        chosen = []
        for texts, keep in self._shares:
            size = _share_of(len(texts), keep)
            chosen.append(texts[np.arange(epoch * size, (epoch + 1) * size) % len(texts)])
        return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, dtype=np.int64)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        plan = self.batches(self._epoch)
        for position in range(self._next, len(plan)):
            # moved on before the batch is handed out: nobody asks for more than len(self) batches
            last = position + 1 == len(plan)
            self._epoch, self._next = (self._epoch + 1, 0) if last else (self._epoch, position + 1)
            yield self._rows.batch(plan[position])

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands: epoch and the next batch."""
        return {"epoch": self._epoch, "next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a saved loader stood."""
        self._epoch, self._next = state["epoch"], state["next"]


def _share_of(num_texts: int, keep: float) -> int:
    return min(num_texts, max(1, round(num_texts * keep)))
