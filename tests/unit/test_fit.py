"""Training one network: it learns, keeps its best weights, and after Ctrl-C goes on as if nothing had been."""

import json
import os
import signal
from dataclasses import fields

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from make_tiny_artifact import make_encoder
from rows import learnable

from mope.backends.network import MopeNetwork
from mope.features import LLM_NUMBERS, NUMBER_NAMES, OPTIONAL_NUMBERS
from mope.training import fit as fitting
from mope.training.batches import encode_rows
from mope.training.config import FitConfig
from mope.training.encoders import find_encoder
from mope.training.fit import FitModule, TrainingInterruptedError, fit, resolve_precision
from mope.training.objectives import Labels, MopeObjective

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory", "ignore:Experiment logs directory", "ignore:The number of training batches",
    "ignore:.*LeafSpec",
)  # fmt: skip
EDGES = [0.5, 5.5, 20.5, 60.5, 200.5, 400.5, 600.5]
SETTINGS = {
    "accelerator": "cpu", "devices": "1", "precision": "32-true", "batch_size": 16, "epochs": 2.0, "dropout": 0.0,
    "learning_rate": 3e-3, "head_learning_rate": 1e-2, "patience": 9,
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(tiny_encoder):
    """Training (96) and validation (40) rows."""
    encoder = make_encoder(find_encoder(str(tiny_encoder)))
    return [encode_rows(learnable(n, split), encoder, split) for split, n in (("train", 96), ("validation", 40))]


@pytest.fixture
def train(rows, tiny_encoder, tmp_path):
    """Fit a fresh network in a folder; gives the network and the result."""

    def run(name="run", *, resume=False, pool_batches=50, objective=None, validation=rows[1], **settings):
        torch.manual_seed(1)
        encoder = find_encoder(str(tiny_encoder)).load()
        for module in encoder.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        network = MopeNetwork(
            encoder,
            number_mean=rows[0].numbers_RF.mean(axis=0).tolist(),
            number_scale=[0.1] * rows[0].numbers_RF.shape[1],
            num_llms=2,
            llm_dim=2,
            gate_borders=[100.5],
            num_heads=2,
            head_borders=EDGES[1:],
            start=100.5,
            head_hidden=8,
            dropout=0.0,
        )
        options = {"description": "training", "resume": resume, "pool_batches": pool_batches}
        own = objective or MopeObjective(EDGES, [100.5])
        result = fit(
            network, own, rows[0], validation, FitConfig(**{**SETTINGS, **settings}), tmp_path / name, **options
        )
        return network, result

    return run


def weights(network):
    return torch.cat([tensor.flatten() for tensor in network.state_dict().values()])


@torch.inference_mode()
def loss(network, rows):
    batch = rows.batch(np.arange(len(rows)))
    gate, heads, _ = network(batch["input_ids_BS"], batch["attention_mask_BS"], batch["numbers_BF"], batch["llm_B"])
    labels = Labels(*(batch[field.name] for field in fields(Labels)))
    return MopeObjective(EDGES, [100.5])(gate, heads, labels).total.item()


def test_it_learns_and_reports_the_loss_of_the_weights_kept(train, rows, tmp_path):
    untrained, _ = train("none", epochs=0.01, learning_rate=1e-9, head_learning_rate=1e-9)
    network, result = train(epochs=6.0)
    assert loss(network, rows[1]) < 0.8 * loss(untrained, rows[1])
    assert result.validation_loss == pytest.approx(loss(network, rows[1]), rel=1e-4)
    assert result.num_steps == 36
    assert not network.training
    assert result.csv.exists()
    assert "validation/loss" in result.csv.read_text().splitlines()[0]
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    saved = json.loads((tmp_path / "run" / "finished.json").read_text())
    assert saved["validation_loss"] == result.validation_loss


def test_the_same_seed_gives_the_same_weights(train):
    first, second = train("a"), train("b")
    assert torch.equal(weights(first[0]), weights(second[0]))
    assert first[1].validation_loss == second[1].validation_loss
    assert not torch.equal(weights(first[0]), weights(train("c", seed=1)[0]))


class _Turning:
    """A loss that gets worse after some validation runs, of one batch each: 5, 4, 3, then 10, 11, ..."""

    def __init__(self):
        self.own, self.checks = MopeObjective(EDGES, [100.5]), 0

    def __call__(self, gate, heads, labels):
        result = self.own(gate, heads, labels)
        if torch.is_grad_enabled():
            return result
        self.checks += 1
        values = [5.0, 4.0, 3.0]
        total = values[self.checks - 1] if self.checks <= 3 else 6.0 + self.checks
        return type(result)(result.total * 0 + total, result.parts)


class _Snapshots(Callback):
    """The weights at each validation run."""

    def __init__(self):
        self.taken = []

    def on_validation_end(self, trainer, pl_module):
        self.taken.append(weights(pl_module.network).clone())


def test_the_weights_of_the_best_validation_run_are_kept_and_patience_ends_it(train, rows, monkeypatch):
    snapshots = _Snapshots()
    with_snapshots = fitting.L.Trainer

    def trainer(**options):
        if "callbacks" in options:
            options["callbacks"].append(snapshots)
        return with_snapshots(**options)

    monkeypatch.setattr(fitting.L, "Trainer", trainer)
    network, result = train(
        epochs=20.0, checks_per_epoch=2, patience=2, objective=_Turning(), validation=rows[1].take(np.arange(30))
    )
    assert result.validation_loss == 3.0
    assert len(snapshots.taken) == 5  # three that improved, two that did not
    assert result.num_steps == 5 * 3
    assert torch.equal(weights(network), snapshots.taken[2])


class _Interrupting(MopeObjective):
    """Sends Ctrl-C to the process in one of the training steps."""

    def __init__(self, step, number=signal.SIGINT, times=1):
        super().__init__(EDGES, [100.5])
        self.left, self.number, self.times = step, number, times

    def __call__(self, *arguments):
        if torch.is_grad_enabled():
            self.left -= 1
            if self.left == 0:
                for _ in range(self.times):
                    os.kill(os.getpid(), self.number)
        return super().__call__(*arguments)


# an epoch has six steps and two validation runs: before any, within and at the end of an epoch, in the last step
@pytest.mark.parametrize("decay", [0.0, 0.5], ids=["weights", "average"])
@pytest.mark.parametrize("step", [1, 4, 6, 12])
def test_a_run_that_was_interrupted_ends_as_one_that_was_not(train, tmp_path, step, decay):
    whole, expected = train("whole", average_decay=decay)
    at = "after the last step, 12" if step == 12 else f"at step {step}"
    with pytest.raises(TrainingInterruptedError, match=f"stopped {at}, saved; add --resume"):
        train(objective=_Interrupting(step), average_decay=decay)
    assert (tmp_path / "run" / "last.ckpt").exists() == (step < 12)
    assert (tmp_path / "run" / "finished.json").exists() == (step == 12)
    counting = _Interrupting(1000)  # counts down, and is never reached
    network, result = train(resume=True, objective=counting, average_decay=decay)
    assert 1000 - counting.left == 12 - step
    assert result.num_steps == expected.num_steps == 12
    assert result.validation_loss == pytest.approx(expected.validation_loss, rel=1e-5)
    torch.testing.assert_close(weights(network), weights(whole), atol=1e-5, rtol=1e-4)


def test_the_average_is_validated_and_kept(train, monkeypatch):
    """Beside an average that is made here, of the weights after each step."""
    averages, seen = [], []
    step = FitModule.on_train_batch_end

    def follow(self, *arguments):
        now = weights(self.network).detach().clone()
        kept = min(0.75, len(averages) / (len(averages) + 1))
        averages.append(now if not averages else kept * averages[-1] + (1 - kept) * now)
        return step(self, *arguments)

    def look(self, batch, batch_index, *_):
        if not batch_index:
            seen.append((len(averages), weights(self.network).detach().clone()))

    monkeypatch.setattr(FitModule, "on_train_batch_end", follow)
    monkeypatch.setattr(FitModule, "on_validation_batch_start", look)
    network, _ = train(average_decay=0.75, patience=100)
    assert [steps for steps, _ in seen] == [3, 6, 9, 12]
    for steps, found in seen:
        torch.testing.assert_close(found, averages[steps - 1], atol=1e-5, rtol=1e-4)
    assert any(torch.allclose(weights(network), average, atol=1e-5) for average in averages)


def test_sigterm_saves_too_and_handlers_are_given_back(train, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(TrainingInterruptedError):
        train(objective=_Interrupting(2, signal.SIGTERM))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert (tmp_path / "run" / "last.ckpt").exists()


def test_a_second_ctrl_c_stops_at_once(train):
    before = signal.getsignal(signal.SIGINT)  # a job in a shell's background ignores Ctrl-C, for example
    with pytest.raises(KeyboardInterrupt):
        train(objective=_Interrupting(2, times=2))
    assert signal.getsignal(signal.SIGINT) is before


def test_a_finished_fit_is_not_repeated(train, monkeypatch):
    network, result = train()
    monkeypatch.setattr(FitModule, "training_step", lambda *_: pytest.fail("trained again"))
    again, same = train(resume=True)
    assert torch.equal(weights(network), weights(again))
    assert (same.validation_loss, same.num_steps) == (result.validation_loss, result.num_steps)


def test_without_resume_it_starts_anew(train, tmp_path):
    first, _ = train()
    (tmp_path / "run" / "stale").write_text("")
    second, result = train()
    assert torch.equal(weights(first), weights(second))
    assert result.num_steps == 12
    assert not (tmp_path / "run" / "stale").exists()


def test_resume_without_a_checkpoint_starts_anew(train):
    assert train(resume=True)[1].num_steps == 12


def test_a_fit_shorter_than_a_check_is_validated_once(train, rows):
    network, result = train(epochs=0.34)
    assert result.num_steps == 2
    assert result.validation_loss == pytest.approx(loss(network, rows[1]), rel=1e-4)


def test_frozen_embeddings_stay_and_others_learn(train, tiny_encoder):
    pretrained = find_encoder(str(tiny_encoder)).load().get_input_embeddings().weight
    frozen, _ = train("frozen")
    free, _ = train("free", freeze_embeddings=False)
    assert torch.equal(frozen.encoder.get_input_embeddings().weight, pretrained)
    assert not torch.equal(free.encoder.get_input_embeddings().weight, pretrained)


def test_the_schedule_warms_up_and_decays(train, rows):
    module = FitModule(train(epochs=0.2)[0], MopeObjective(EDGES, [100.5]), FitConfig(warmup_share=0.1), 100)
    module._trainer = type("T", (), {"strategy": type("S", (), {"root_device": torch.device("cpu")})})()
    made = module.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(101):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    encoder, heads = np.array(rates).T
    assert encoder.max() == pytest.approx(8e-5)
    assert heads.max() == pytest.approx(1e-3)
    assert encoder.argmax() == pytest.approx(10, abs=1)
    assert encoder[0] == pytest.approx(8e-6)
    assert np.all(np.diff(encoder[10:]) <= 0)
    assert encoder[100] == pytest.approx(0.02 * 8e-5)


def test_every_parameter_is_in_one_group(train):
    network, _ = train(epochs=0.2)
    module = FitModule(network, MopeObjective(EDGES, [100.5]), FitConfig(), 10)
    module._trainer = type("T", (), {"strategy": type("S", (), {"root_device": torch.device("cpu")})})()
    groups = module.configure_optimizers()["optimizer"].param_groups
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = [id(parameter) for parameter in network.parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(trainable)


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16-mixed"), (False, "32-true")])
def test_bf16_is_chosen_where_the_hardware_multiplies_it(monkeypatch, native, expected):
    monkeypatch.setattr(fitting, "native_bf16", lambda: native)
    assert resolve_precision(FitConfig()) == expected
    assert resolve_precision(FitConfig(precision="16-mixed")) == "16-mixed"


def test_some_rows_forget_which_llm_answers():
    torch.manual_seed(0)
    num_rows, parents = 20_000, torch.tensor([0, 0, 1, 0])  # 1 is a relative of 2; 3 has none
    numbers = torch.ones(num_rows, len(NUMBER_NAMES))
    batch = {"llm_B": torch.full((num_rows,), 2), "numbers_BF": numbers, "scale_B": torch.arange(num_rows)}
    found = fitting.without_some_llms(batch, parents, 0.2)
    shares = torch.bincount(found["llm_B"], minlength=3) / num_rows
    assert shares.tolist() == pytest.approx([0.2, 0.2, 0.6], abs=0.01)
    hidden = (found["numbers_BF"] == 0).any(dim=1)
    assert hidden.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert set(found["llm_B"][hidden].tolist()) == {0}
    assert torch.nonzero((found["numbers_BF"] == 0).any(dim=0)).flatten().tolist() == list(LLM_NUMBERS)
    assert torch.equal(batch["numbers_BF"], torch.ones_like(numbers))  # the rows themselves stay
    assert torch.equal(found["scale_B"], batch["scale_B"])
    alone = fitting.without_some_llms({**batch, "llm_B": torch.full((num_rows,), 3)}, parents, 0.2)
    assert (alone["llm_B"] == 0).float().mean().item() == pytest.approx(0.4, abs=0.01)
    assert fitting.without_some_llms(batch, parents, 0.0) is batch


@pytest.mark.parametrize("chunks", [1, 3])
def test_rows_that_share_a_text_are_encoded_once_and_come_out_the_same(train, rows, chunks):
    network, _ = train(epochs=0.1)
    own = rows[0]
    rng = np.random.default_rng(0)
    picked = rng.integers(0, 20, 30)  # some texts several times
    shared = own.take(picked)
    shared.llm_R[:] = rng.permutation(len(shared)) % 3
    batch = shared.batch(rng.permutation(len(shared)))
    assert int(batch["text_B"].max()) + 1 < len(shared)
    encoded = []

    def count(module, args, kwargs, output):
        encoded.append(len(kwargs["input_ids"]))

    network.encoder.register_forward_hook(count, with_kwargs=True)
    module = FitModule(network, MopeObjective(EDGES, [100.5]), FitConfig(**SETTINGS), 1, chunks)
    with torch.inference_mode():
        gate, heads = module._outputs(batch)
        assert sum(encoded) == int(batch["text_B"].max()) + 1
        expected = network(batch["input_ids_BS"], batch["attention_mask_BS"], batch["numbers_BF"], batch["llm_B"])
    torch.testing.assert_close(gate, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(heads, expected[1], rtol=1e-4, atol=1e-5)


def test_some_rows_do_not_say_their_flags():
    torch.manual_seed(0)
    numbers = torch.ones(20_000, len(NUMBER_NAMES))
    batch = {"numbers_BF": numbers}
    found = fitting.without_some_flags(batch, 0.3)["numbers_BF"]
    optional = [number for group in OPTIONAL_NUMBERS for number in group]
    assert torch.nonzero((found == 0).any(dim=0)).flatten().tolist() == sorted(optional)
    for group in OPTIONAL_NUMBERS:
        of_group = found[:, list(group)]
        assert (of_group.max(dim=1).values == of_group.min(dim=1).values).all()  # known or not as a whole
        assert of_group.mean().item() == pytest.approx(0.7, abs=0.02)
    assert torch.equal(numbers, torch.ones_like(numbers))  # the rows themselves stay
    assert fitting.without_some_flags(batch, 0.0) is batch
