"""`LengthPredictor`: ask it one by one or in batches, teach it, save it, and whatever users get wrong."""

import json
from itertools import permutations

import numpy as np
import pytest
from make_tiny_artifact import PROMPTS, make_predictor

from mope import LengthPredictor, Request
from mope.errors import ArtifactError, ConfigError, DataError
from mope.inputs import as_request
from mope.target_llm import LlmTable
from mope.tool_use import json_chars

HISTORY = [{"role": "user", "content": "Why is the sky blue?"}, {"role": "assistant", "content": "Scattering. " * 40}]


def same(first, second, tolerance=0.0):
    return (
        np.abs(first.cumulative - second.cumulative).max() <= tolerance
        and first.expert == second.expert
        and first.source == second.source
        and first.max_tokens == second.max_tokens
    )


@pytest.mark.parametrize("design", ["tiny", "tiny_separate"])
def test_saved_and_loaded_it_predicts_bit_for_bit_the_same(design, request, tmp_path):
    predictor = LengthPredictor.from_pretrained(request.getfixturevalue(design))
    again = LengthPredictor.from_pretrained(predictor.save_pretrained(tmp_path / "again"))
    for first, second in zip(predictor.predict_batch(PROMPTS), again.predict_batch(PROMPTS), strict=True):
        assert same(first, second)
        assert first.route_probabilities == second.route_probabilities
    assert again.config == predictor.config


@pytest.mark.parametrize(("design", "num_experts"), [("shared", 1), ("shared", 2), ("separate", 1), ("separate", 3)])
def test_every_design_and_number_of_experts_can_be_saved_and_asked(tiny_encoder, tmp_path, design, num_experts):
    predictor = make_predictor(tiny_encoder, design, num_experts)
    folder = predictor.save_pretrained(tmp_path / "saved")
    names = {path.name for path in folder.glob("*.safetensors")} - {"lookup.safetensors"}
    separate = {"gate.safetensors", *(f"expert-{k}.safetensors" for k in range(num_experts))}
    assert names == ({"model.safetensors"} if design == "shared" else separate)
    prediction = LengthPredictor.from_pretrained(folder).predict("Write an essay.")
    assert len(prediction.route_probabilities) == num_experts
    assert sum(prediction.route_probabilities) == pytest.approx(1.0)
    assert prediction.source == "model"


@pytest.mark.parametrize("design", ["tiny", "tiny_separate"])
def test_batch_and_order_do_not_change_predictions(design, request):
    """Padding is masked: what differs is the order of float32 sums."""
    predictor = LengthPredictor.from_pretrained(request.getfixturevalue(design))
    prompts = list(PROMPTS)
    alone = [predictor.predict(prompt) for prompt in prompts]
    forward = predictor.predict_batch(prompts)
    backward = predictor.predict_batch(prompts[::-1])[::-1]
    assert len({prediction.expert for prediction in alone}) > 1
    for one, two, three in zip(alone, forward, backward, strict=True):
        assert same(one, two, 1e-4)
        assert same(one, three, 1e-4)


def test_a_separate_design_runs_no_more_experts_than_it_needs(tiny_separate, monkeypatch):
    predictor = LengthPredictor.from_pretrained(tiny_separate)
    predictor.config = predictor.config.model_copy(update={"combination": "top1"})
    asked = []
    for k, network in enumerate(predictor.backend.networks[1:]):
        network.register_forward_hook(lambda module, inputs, output, k=k: asked.append((k, len(inputs[0]))))
    predictions = predictor.predict_batch(PROMPTS)
    routed = [prediction.expert for prediction in predictions]
    assert asked == [(k, routed.count(k)) for k in range(2) if k in routed]


def test_a_prediction_is_what_the_readme_says(predictor):
    prediction = predictor.predict("Explain TCP slow start.", target_llm="llama-3-8b", max_tokens=512)
    assert 0 < prediction.quantile(0.1) < prediction.median < prediction.quantile(0.9) <= 512
    assert 0 < prediction.mean <= 512
    assert prediction.expert == int(np.argmax(prediction.route_probabilities))
    assert prediction.source == "model"
    assert prediction.target_llm == "llama-3-8b"
    assert prediction.remaining(generated=120).median > 0


def test_prompts_that_ask_for_more_are_predicted_longer(predictor):
    short, long = predictor.predict("in one word: why?"), predictor.predict("Write an essay about cats")
    assert short.expert == 0
    assert long.expert == 2
    assert long.median > 3 * short.median


def test_messages_and_history_are_the_same_request(predictor):
    by_history = predictor.predict("and at night?", history=HISTORY, system="Be brief.", temperature=0.7)
    messages = [{"role": "system", "content": "Be brief."}, *HISTORY, {"role": "user", "content": "and at night?"}]
    assert same(by_history, predictor.predict(messages=messages, temperature=0.7))
    entry = {"id": 7, "prompt": "and at night?", "history": HISTORY, "system": "Be brief.", "temperature": 0.7}
    assert same(by_history, predictor.predict_batch([entry])[0])
    assert not same(by_history, predictor.predict("and at night?"), 1e-3)


def test_content_may_come_in_parts(predictor):
    parts = [
        {"type": "text", "text": "Why is"},
        {"type": "image_url", "image_url": {}},
        {"type": "text", "text": "it so?"},
    ]
    assert same(predictor.predict(messages=[{"role": "user", "content": parts}]), predictor.predict("Why is\nit so?"))


def test_openai_flags_are_understood():
    tools = [{"type": "function"}]
    request = as_request({"prompt": "a", "response_format": {"type": "json_object"}, "tools": tools, "thinking": False})
    offered = {"tools": True, "num_tools": 1, "tool_chars": json_chars(tools)}
    assert request == Request(prompt="a", response_format="json_object", thinking=False, **offered)
    assert as_request({"prompt": "a", "response_format": {"type": "text"}, "tools": []}) == Request(prompt="a")
    assert as_request({"prompt": "a", "response_format": None, "max_tokens": None}) == Request(prompt="a")


@pytest.mark.parametrize("text", ["", "  \n", "\t"])
def test_no_text_gets_the_fallback_and_says_so(predictor, text):
    prediction = predictor.predict(text, max_tokens=100)
    assert prediction.source == "fallback:no text"
    assert prediction.expert == -1
    assert prediction.route_probabilities == tuple(predictor.router.prior)
    assert prediction.quantile(1.0) == 100
    lengths = sorted(PROMPTS.values())
    assert lengths[10] < predictor.predict(text).median < lengths[13]


def test_rows_without_text_do_not_shift_the_others(predictor):
    mixed = predictor.predict_batch(["", "hello", "", "Write an essay", " "])
    assert [prediction.source for prediction in mixed] == ["fallback:no text", "model"] * 2 + ["fallback:no text"]
    assert same(mixed[3], predictor.predict("Write an essay"), 1e-4)
    assert predictor.predict_batch([]) == []


@pytest.mark.parametrize("text", ["\ud800", "a\0", "🙂" * 5000, "a" * 200_000, "[CLS][SEP][PAD]", "\u202e" * 50])
def test_hostile_text_is_answered(predictor, text):
    prediction = predictor.predict(
        text, history=[{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    )
    assert prediction.source == "model"
    assert np.isfinite(prediction.quantiles([0.1, 0.5, 0.99])).all()


def test_observing_shifts_later_predictions_for_that_llm(predictor):
    before = {llm: predictor.predict("hello", target_llm=llm).median for llm in ("llama-3-8b", "gpt-4")}
    for _ in range(60):
        prediction = predictor.predict("hello", target_llm="llama-3-8b")
        predictor.observe(prediction, actual_tokens=round(5 * before["llama-3-8b"]))
    after = predictor.predict("hello", target_llm="llama-3-8b").median
    assert after > 2.5 * before["llama-3-8b"]
    assert predictor.predict("hello", target_llm="gpt-4").median < after * before["gpt-4"] / before["llama-3-8b"]


def test_one_client_of_many_teaches_its_share(predictor):
    prediction = predictor.predict("hello")
    for number in range(200):
        assert predictor.observe(prediction, round(prediction.median), client=f"c{number % 10}")
    learned = [predictor.observe(prediction, 90_000, client="another") for _ in range(100)]
    assert 20 < learned.count(True) < 30
    assert predictor.predict("hello").mean < 2 * prediction.mean
    with pytest.raises(DataError, match="client is int; expected a name or None"):
        predictor.observe(prediction, 5, client=7)


def test_observing_learns_from_the_uncorrected_prediction(predictor):
    """Else a correction that works would look like a reason to undo it."""
    truth = round(3 * predictor.predict("hello").median)
    medians = []
    for _ in range(200):
        prediction = predictor.predict("hello")
        medians.append(prediction.median)
        predictor.observe(prediction, truth)
    assert medians[-1] == pytest.approx(truth, rel=0.25)
    assert medians[-1] == pytest.approx(medians[-50], rel=0.1)


def test_an_answer_at_its_cap_counts_as_cut(predictor):
    """It says that the answer would have been longer than 3 tokens, which was expected anyway."""
    before = predictor.predict("hello").median
    prediction = predictor.predict("hello", max_tokens=3)
    for _ in range(30):
        predictor.observe(prediction, 3)
    assert predictor.predict("hello").median > 0.95 * before
    for _ in range(60):
        predictor.observe(prediction, 3, censored=False)
    assert predictor.predict("hello").median < 6
    assert len(predictor.recalibrator) == 90


@pytest.mark.parametrize(
    ("flags", "mode"),
    [
        ({}, ""),
        ({"thinking": True}, "thinking"),
        ({"thinking": False}, "no thinking"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_schema"}, "thinking": True}, "thinking+json"),
        ({"response_format": "grammar", "tools": True}, "tools+format"),
    ],
)
def test_how_an_llm_is_asked_is_its_mode(predictor, flags, mode):
    assert predictor.predict("hello", **flags).mode == mode


def test_modes_learn_apart(predictor):
    plain, thinking = predictor.predict("hello", target_llm="gpt-4"), {"target_llm": "gpt-4", "thinking": True}
    for _ in range(60):
        predictor.observe(predictor.predict("hello", **thinking), round(20 * plain.median), time_s=1e9)
        predictor.observe(predictor.predict("hello", target_llm="gpt-4"), round(plain.median), time_s=1e9)
    assert predictor.predict("hello", **thinking).median > 10 * plain.median
    assert predictor.predict("hello", target_llm="gpt-4").median < 1.5 * plain.median


UNKNOWN = {
    "": ((0.5, 0.3), (1.0, 0.4), (2.0, 0.2), (20.0, 0.1)),
    "thinking": ((1.0, 0.2), (8.0, 0.5), (30.0, 0.3)),
    "tools": ((0.2, 0.5), (1.0, 0.5)),
    "json": ((0.3, 0.5), (1.0, 0.5)),
}


@pytest.fixture
def worldly(tiny):
    """A predictor that knows two LLMs, and how others may differ from them."""
    made = LengthPredictor.from_pretrained(tiny, backend="torch")
    made.encoder.llms = LlmTable(("gpt-4", "llama-3-8b-instruct"))
    settings = made.config.model_copy(update={"unknown_llms": UNKNOWN, "unnamed_llm": False})
    return LengthPredictor(settings, made.backend, made.encoder, made.router, made.calibration, made._fallback)


def width(prediction):
    return prediction.quantile(0.9) / prediction.quantile(0.1)


def test_of_an_unknown_llm_it_says_that_it_does_not_know(worldly):
    known = worldly.predict("hello", target_llm="openai/GPT-4")
    for name in ("somebody-s-llm", None, "gpt-4-turbo"):  # a relative is not the LLM itself
        unknown = worldly.predict("hello", target_llm=name)
        assert width(unknown) > 2 * width(known), name
        assert unknown.quantile(0.99) > 5 * known.quantile(0.99), name
        assert 0.5 < unknown.median / known.median < 2, name
    assert width(worldly.predict("hello", target_llm="Llama-3-8B-Instruct")) == pytest.approx(width(known), rel=0.3)


def test_an_unknown_llm_is_known_once_it_was_observed(worldly):
    unknown = worldly.predict("hello", target_llm="new")
    for row in range(100):
        worldly.observe(worldly.predict("hello", target_llm="new"), 9000 + row, time_s=1e9 + row)
    learned = worldly.predict("hello", target_llm="new")
    assert learned.median == pytest.approx(9050, rel=0.25)
    assert width(learned) < 0.5 * width(unknown)
    assert worldly.predict("hello", target_llm="gpt-4").median < 0.1 * learned.median


def test_flags_that_no_training_row_had_shift_the_length(worldly):
    usual = worldly.predict("hello", target_llm="gpt-4")
    assert worldly.predict("hello", target_llm="gpt-4", thinking=True).median > 3 * usual.median
    assert worldly.predict("hello", target_llm="gpt-4", tools=True).median < 0.8 * usual.median
    assert worldly.predict("hello", target_llm="gpt-4", response_format="json_object").median < 0.9 * usual.median
    both = worldly.predict("hello", target_llm="gpt-4", thinking=True, tools=True)
    assert both.median > 3 * usual.median  # thoughts go first


@pytest.mark.parametrize("llm", ["gpt-4", "new"])
def test_a_thinking_budget_bounds_the_thoughts(worldly, llm):
    levels = [0.1, 0.5, 0.9, 0.99]
    plain = worldly.predict("hello", target_llm=llm).quantiles(levels)
    free = worldly.predict("hello", target_llm=llm, thinking=True).quantiles(levels)
    before = plain
    for budget in (1, 10, 100, 1000, 10_000, 2**31 - 1):
        found = worldly.predict("hello", target_llm=llm, thinking=True, thinking_budget=budget).quantiles(levels)
        assert (found <= 1.25 * (plain + budget)).all()  # within a bin
        assert (found <= free + 1e-6).all()
        assert (found >= 0.9 * before).all() or budget == 1
        before = found
    assert found == pytest.approx(free)


def test_the_fallback_learns_apart_from_the_network(predictor):
    for _ in range(30):
        predictor.observe(predictor.predict("", target_llm="gpt-4"), 5)
    (learned,) = predictor.recalibrator.summary()
    assert learned.target.mode == "fallback"
    assert learned.target.known
    predictor.observe(predictor.predict("hello", target_llm="somebody's", thinking=True), 5)
    assert [(one.target.llm, one.target.mode, one.target.known) for one in predictor.recalibrator.summary()] == [
        ("gpt-4", "fallback", True),
        ("somebody's", "thinking", False),
    ]


def test_answers_beyond_the_grid_are_predicted_beyond_it(predictor):
    prediction = predictor.predict("Write an essay about cats")
    for _ in range(40):
        predictor.observe(prediction, round(300 * prediction.median))
    after = predictor.predict("Write an essay about cats")
    assert after.median == pytest.approx(300 * prediction.median, rel=0.2)
    assert after.median > prediction.edges[-1]
    assert after.mean > prediction.edges[-1]
    predictor.observe(after, round(300 * prediction.median))  # it still carries what observe needs


def test_a_prior_for_unknown_llms_is_part_of_the_predictor(predictor, tmp_path):
    settings = predictor.config.model_copy(update={"unknown_llms": {"": ((10.0, 1.0),)}})
    cautious = LengthPredictor(
        settings, predictor.backend, predictor.encoder, predictor.router, predictor.calibration, predictor._fallback
    )
    folder = cautious.save_pretrained(tmp_path / "cautious")
    again = LengthPredictor.from_pretrained(folder)
    known, unknown = (again.predict("hello", target_llm=name).median for name in ("gpt-4", "somebody's"))
    assert unknown > 5 * known


def test_a_family_that_is_not_known_is_told_once_and_changes_nothing(predictor, caplog):
    families = predictor.encoder.llms.families()
    assert families
    plain = predictor.predict("hello")
    with caplog.at_level("WARNING", logger="mope"):
        for _ in range(2):
            assert same(predictor.predict("hello", llm_family=f"{families[0]}x"), plain)
            assert same(predictor.predict_batch([{"prompt": "hello", "llm_family": "z\nz"}])[0], plain)
        for known in ("", *families):
            predictor.predict("hello", llm_family=known)
        for number in range(200):  # whoever sends names must not fill the log
            predictor.predict("hello", llm_family=f"strange-{number}")
    typo, other, *more = (record.getMessage() for record in caplog.records)
    listed = f"known are {', '.join(families)}"
    assert typo.startswith(f"llm_family '{families[0]}x' is not known (did you mean {families[0]}")
    assert typo.endswith(listed)
    assert other == (
        "llm_family 'z\\nz' is not known: predicted as if none were given, until answers were observed; " + listed
    )
    assert len(more) == 98


def test_what_is_no_prediction_and_no_number_of_tokens_is_refused(predictor):
    with pytest.raises(DataError, match="prediction is int; expected what predict"):
        predictor.observe(5, 5)
    with pytest.raises(DataError, match="actual_tokens is bool; expected a number of tokens"):
        predictor.observe(predictor.predict("hello"), True)


def test_a_time_that_is_none_is_refused(predictor):
    with pytest.raises(DataError, match="time_s is in seconds since 1970; got 'now'"):
        predictor.observe(predictor.predict("hello"), 10, time_s="now")


def test_what_was_learned_is_saved_and_goes_on(predictor, tmp_path):
    for actual in (5, 50, 700):
        predictor.observe(predictor.predict("hello", target_llm="gpt-4"), actual)
    folder = predictor.save_pretrained(tmp_path / "taught")
    assert "recalibration.json" in json.loads((folder / "files.json").read_text())
    again = LengthPredictor.from_pretrained(folder)
    for one in (predictor, again):
        one.observe(one.predict("why?", target_llm="gpt-4"), 99)
    assert same(predictor.predict("hello", target_llm="gpt-4"), again.predict("hello", target_llm="gpt-4"))
    assert same(predictor.predict("hello"), again.predict("hello"))


def test_what_is_for_people_is_kept_when_saved_again(predictor, tmp_path, tiny):
    folder = predictor.save_pretrained(tmp_path / "again")
    assert (folder / "README.md").read_bytes() == (tiny / "README.md").read_bytes()
    (folder / "plots").mkdir()
    (folder / "plots" / "calibration.png").write_bytes(b"png")
    LengthPredictor.from_pretrained(folder).save_pretrained(folder)
    assert (folder / "plots" / "calibration.png").read_bytes() == b"png"


def test_push_to_hub_uploads_a_whole_predictor(predictor, monkeypatch):
    calls = []

    class FakeApi:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, *, private, exist_ok):
            calls.append(("create", repo_id, private, exist_ok))

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            loaded = LengthPredictor.from_pretrained(folder_path)
            calls.append(("upload", repo_id, same(loaded.predict("hello"), predictor.predict("hello"))))
            return "https://hub.invalid/commit/1"

    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    assert predictor.push_to_hub("me/mine", private=True, token="secret") == "https://hub.invalid/commit/1"
    assert calls == [("token", "secret"), ("create", "me/mine", True, True), ("upload", "me/mine", True)]


def test_a_hub_id_is_downloaded(tiny, monkeypatch):
    asked = []

    def fake_download(name, *, revision, allow_patterns):
        asked.append((name, revision))
        assert "config.json" in allow_patterns
        return str(tiny)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake_download)
    assert LengthPredictor.from_pretrained("me/mine", revision="v1").config.num_experts == 3
    assert asked == [("me/mine", "v1")]


def test_a_hub_id_that_is_not_there_is_one_line():
    with pytest.raises(ArtifactError, match="no folder me/nothing, and the Hugging Face Hub gave none: ") as caught:
        LengthPredictor.from_pretrained("me/nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no-such-folder", "./me/nothing", "/nowhere/at/all"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(ArtifactError, match="no saved predictor at"):
        LengthPredictor.from_pretrained(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "abacus"}, "unknown backend 'abacus'; expected one of 'torch', 'onnx', 'onnx-gpu', 'tensorrt'"),
        ({"device": "toaster"}, "device 'toaster' can't be used"),
    ],
)
def test_an_unknown_engine_or_device_is_refused(tiny, options, message):
    with pytest.raises(ConfigError, match=message):
        LengthPredictor.from_pretrained(tiny, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either a prompt or messages; got neither"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "got prompt and messages"),
        ({"messages": HISTORY, "history": HISTORY}, "messages hold the history already"),
        ({"messages": []}, "no message with role 'user' among 0 messages"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "no message with role 'user' among 1"),
        ({"messages": ["hello"]}, "message 0 is str without a role"),
        ({"prompt": 5}, "a request is a prompt, a mapping or a Request; got int"),
        ({"prompt": b"a"}, "prompt is bytes; expected a string"),
        ({"prompt": {"prompt": "a"}, "max_tokens": 5}, "a whole request was given, and max_tokens as well"),
        ({"prompt": "a", "max_token": 5}, r"field 'max_token' \(did you mean max_tokens\?\); known are prompt"),
        ({"prompt": "a", "model": "gpt-4"}, r"unknown request field 'model' \(did you mean target_llm\?\); known are"),
        ({"prompt": "a", "max_tokens": 0}, "from 1 to 2147483647; got 0"),
        ({"prompt": "a", "max_tokens": 10**400}, "max_tokens is a whole number"),
        ({"prompt": "a", "max_tokens": True}, "got True"),
        ({"prompt": "a", "max_tokens": "many"}, "got 'many'"),
        ({"prompt": "a", "temperature": float("nan")}, "temperature is a number from 0 to 100; got nan"),
        ({"prompt": "a", "temperature": "hot"}, "got 'hot'"),
    ],
)
def test_what_users_get_wrong_is_said_in_one_line(predictor, arguments, message):
    with pytest.raises(DataError, match=message) as caught:
        predictor.predict(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (3, "a prompt, a mapping or a Request; got int"),
        ({"id": 1}, "got neither"),
        ({"prompt": ["a", "b"]}, "prompt is list; expected a string"),
        ({"prompt": "a", "max_completion_token": 3}, r"\(did you mean max_completion_tokens\?\)"),
        ({"prompt": "a", "target_lm": "x"}, r"unknown request field 'target_lm' \(did you mean target_llm\?\)"),
    ],
)
def test_a_batch_entry_that_cannot_be_read_is_refused(predictor, entry, message):
    with pytest.raises(DataError, match=rf"request 1 of the batch \(the first is 0\): .*{message}"):
        predictor.predict_batch(["fine", entry])


def test_observe_refuses_what_remains_and_nothing(predictor):
    prediction = predictor.predict("hello")
    with pytest.raises(DataError, match="not one made by remaining"):
        predictor.observe(prediction.remaining(5), 10)
    with pytest.raises(DataError, match="at least 1 token; got 0"):
        predictor.observe(prediction, 0)


def test_the_order_of_flags_does_not_matter(predictor):
    flags = {"max_tokens": 64, "temperature": 0.1, "tools": True}
    found = [predictor.predict("hello", **dict(order)) for order in permutations(flags.items())]
    assert all(same(found[0], other) for other in found)


def test_repr_says_what_it_is(predictor):
    said = (
        "LengthPredictor(small, shared, 3 experts, encoder 'tiny-random-bert', backend torch, since it was asked for)"
    )
    assert repr(predictor) == said
