"""The saved predictor's config: names of experts, strictness, and a dump that reloads to the same bytes."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from mope.config import PredictorConfig
from mope.predictor import LengthPredictor


def test_the_ranges_of_the_experts_have_no_gap(predictor: LengthPredictor) -> None:
    config = predictor.config.model_copy(update={"boundaries": (53.5, 210.5)})
    assert config.expert_names == ("0: up to 53", "1: 54 to 210", "2: above 210")
    assert config.model_copy(update={"boundaries": ()}).expert_names == ("0: all",)
    assert config.model_copy(update={"boundaries": (9.5,)}).expert_names == ("0: up to 9", "1: above 9")


def test_a_dump_reloads_byte_for_byte(predictor: LengthPredictor) -> None:
    text = json.dumps(predictor.config.model_dump(mode="json"))
    assert json.dumps(PredictorConfig.model_validate_json(text).model_dump(mode="json")) == text


def test_unknown_and_missing_fields_are_errors_and_nothing_can_be_changed(predictor: LengthPredictor) -> None:
    fields = predictor.config.model_dump(mode="json")
    with pytest.raises(ValidationError, match="Extra inputs"):
        PredictorConfig.model_validate({**fields, "surprise": 1})
    del fields["boundaries"]
    with pytest.raises(ValidationError, match="boundaries"):
        PredictorConfig.model_validate(fields)
    with pytest.raises(ValidationError, match="frozen"):
        predictor.config.preset = "base"  # type: ignore[misc]
