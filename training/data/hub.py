"""A data set of the Hugging Face Hub as a source of records, streamed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from mope.errors import DataError
from mope.extras import require
from mope.field_map import NO_FIELDS, FieldMap
from mope.log_records import canonical
from mope.training.data.files import Located
from mope.training.data.formats import COLUMNS, MODERATION_COLUMN
from mope.training.data.problems import Problems


@dataclass(frozen=True)
class Hub:
    """A data set of the Hugging Face Hub, streamed."""

    name: str
    config: str | None
    split: str
    revision: str | None
    fields: FieldMap = NO_FIELDS

    recorded_in: ClassVar[str | None] = None
    reader: ClassVar[None] = None
    keeps_evaluation_prompts: ClassVar[bool] = False

    def identity(self) -> str:
        """Name and commit; the commit is asked for if the revision is not one, and the network is there."""
        revision = self.revision
        if not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
            hub = require("huggingface_hub", f"the data set {self.name!r}")
            try:
                revision = hub.HfApi().dataset_info(self.name, revision=self.revision).sha
            except Exception as error:  # any failure of the network ends up here
                raise _hub_error(self.name, error) from error
        return f"{self.name}/{self.config}/{self.split}@{revision}"

    def num_records(self) -> int | None:
        """Not known before the end of a stream."""
        return None

    def records(self, problems: Problems, *, moderation: bool = False) -> Iterator[Located]:
        """Every record of the split."""
        yield from self.fields.apply(self._raw(moderation), problems, self.name)

    def _raw(self, moderation: bool) -> Iterator[Located]:
        datasets = require("datasets", f"the data set {self.name!r}")
        try:
            stream = datasets.load_dataset(
                self.name, self.config, split=self.split, revision=self.revision, streaming=True
            )
            wanted = [
                name
                for name in stream.features or ()
                if canonical(name) in COLUMNS or self.fields.needs(name) or (moderation and name == MODERATION_COLUMN)
            ]
            for row, record in enumerate(stream.select_columns(wanted) if wanted else stream):
                yield f"{self.name}:{row}", record
        except Exception as error:  # the layers below share no base class
            raise _hub_error(self.name, error) from error


def _hub_error(name: str, error: Exception) -> DataError:
    """One line for whatever went wrong between here and the Hub."""
    said = " ".join(str(error).split())
    kinds = " ".join(kind.__name__ for kind in type(error).__mro__)
    if "Gated" in kinds or "gated" in said or "401" in said or "403" in said:
        return DataError(
            f"data set {name!r} is gated or private: accept its licence on its page on the Hub, then log in with "
            "`hf auth login` or set HF_TOKEN"
        )
    if "NotFound" in kinds:
        return DataError(f"data set {name!r} was not found on the Hub (or is private: `hf auth login`): {said[:200]}")
    if "Connect" in kinds or "Offline" in kinds or "Timeout" in kinds or "Connection" in said or "offline" in said:
        return DataError(
            f"data set {name!r} can't be read without a network ({type(error).__name__}); connect (where its licence "
            "must be accepted first, type `hf auth login`, too), or give the path of a downloaded copy"
        )
    return DataError(f"data set {name!r} can't be read: {type(error).__name__}: {said[:300]}")
