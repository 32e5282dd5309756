"""The learner on a toy: one weight under one adapter, and an objective whose gradient is known."""

from dataclasses import dataclass
from types import MappingProxyType

import pytest
import torch

from diffusion import Condition, Loss, RectifiedFlow
from runtime.experiment.config import OptimizerSection
from runtime.roles.learn import AVERAGE, Counted, Learner
from runtime.roles.memory import PeakMemory


class Adapters:
    def __init__(self, names):
        self._all = {name: {"w": torch.nn.Parameter(torch.tensor([1.0, 1.0]))} for name in names}
        self.names = tuple(names)

    def parameters(self, name):
        return list(self._all[name].values())

    def named_parameters(self, name):
        return self._all[name]


class Toy:
    """A generator with nothing but adapters, and its network."""

    path = RectifiedFlow()

    def __init__(self, names=("policy",)):
        self.adapters = Adapters(names)

    def __call__(self, x, t, condition, adapter):
        return x * self.adapters.parameters(adapter)[0].sum()


@dataclass
class Rows:
    x: torch.Tensor

    def __len__(self):
        return len(self.x)

    def __getitem__(self, rows):
        return Rows(self.x[rows])


class MeanPrediction:
    """Loss: the mean prediction, so its gradient is the mean of x."""

    players = ("policy",)
    group_size, updates = 2, 1
    idle_metrics = MappingProxyType({"ratio/max_log": 0.0})

    def loss(self, player, items, predict, path):
        value = predict(items.x, torch.tensor(0.5), Condition({}), player).mean()
        return Loss(value, {"ratio/max_log": items.x.max().item(), "ratio/clip_fraction": items.x.mean().item()})


def learner(names=("policy",), micro_batch=64, steps=10, **optimizer):
    toy = Toy(names)
    return Learner(
        toy,
        Counted(toy),
        MeanPrediction(),
        OptimizerSection(**{"lr": 0.1, "weight_decay": 0.0} | optimizer),
        steps,
        micro_batch,
        PeakMemory(torch.device("cpu")),
    )


ROWS = Rows(torch.tensor([1.0, 2.0, 3.0, 6.0, 8.0]))


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 64])
def test_micro_batches_add_up_to_the_whole(micro_batch):
    one = learner(micro_batch=micro_batch, grad_clip=1e9)
    metrics = one.update(1, ROWS)
    assert metrics["grad_norm"] == pytest.approx(4 * 2**0.5)
    assert metrics["loss"] == pytest.approx(8.0)
    assert metrics["ratio/max_log"] == 8
    assert metrics["ratio/clip_fraction"] == pytest.approx(4)
    assert one.predict.with_gradient == 5
    torch.testing.assert_close(one.generator.adapters.parameters("policy")[0].data, torch.tensor([0.9, 0.9]))
    assert metrics["adapter_norm"] == pytest.approx(0.9 * 2**0.5)


@pytest.mark.parametrize("micro_batch", [1, 2, 64])
def test_a_metric_of_some_rows_counts_for_these_alone(micro_batch):
    class Known(MeanPrediction):
        def loss(self, player, items, predict, path):
            loss, few = super().loss(player, items, predict, path), items.x[items.x > 2]
            means = {"few": few.mean().item()} if len(few) else {}
            return Loss(loss.value, means, {"few": len(few)})

    one = learner(micro_batch=micro_batch)
    one.objective = Known()
    assert one.update(1, ROWS)["few"] == pytest.approx(17 / 3)


def test_without_items_nothing_moves():
    one = learner()
    metrics = one.update(1, ROWS[:0])
    assert metrics == {"loss": 0.0, "grad_norm": 0.0, "ratio/max_log": 0.0, "adapter_norm": pytest.approx(2**0.5)}


def test_a_gradient_that_is_not_finite_stops_before_the_step():
    one = learner()
    with pytest.raises(FloatingPointError, match="step 3, policy"):
        one.update(3, Rows(torch.tensor([float("inf")])))
    assert one.generator.adapters.parameters("policy")[0].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("schedule", "warmup", "rates"),
    [
        ("constant", 0, [1, 1, 1, 1]),
        ("constant", 2, [0.5, 1, 1, 1]),
        ("linear", 0, [1, 0.75, 0.5, 0.25]),
        ("cosine", 2, [0.5, 1, 1, 0.5]),
    ],
)
def test_schedules(schedule, warmup, rates):
    one = learner(steps=4, schedule=schedule, warmup_steps=warmup)
    assert [one.rate(step) for step in (1, 2, 3, 4)] == pytest.approx(rates)


def test_the_average_follows_the_policy():
    one = learner(names=("policy", AVERAGE), ema=0.75, grad_clip=1e9)
    one.update(1, ROWS)
    torch.testing.assert_close(one.generator.adapters.parameters(AVERAGE)[0].data, torch.tensor([0.975, 0.975]))


def test_accumulation_takes_the_mean_gradient_of_several_updates():
    one, twice = learner(grad_clip=1e9, betas=(0.0, 0.0)), learner(grad_clip=1e9, betas=(0.0, 0.0), accumulation=2)
    one.update(1, ROWS)
    assert twice.update(1, ROWS)["grad_norm"] == pytest.approx(2 * 2**0.5)
    assert twice.generator.adapters.parameters("policy")[0].tolist() == [1.0, 1.0]
    assert twice.update(2, ROWS)["grad_norm"] == pytest.approx(4 * 2**0.5)
    torch.testing.assert_close(*[learner.generator.adapters.parameters("policy")[0] for learner in (one, twice)])
    assert twice.update(3, ROWS)["grad_norm"] == pytest.approx(one.update(2, ROWS)["grad_norm"] / 2)


def test_the_average_follows_every_move_of_the_optimiser():
    one = learner(names=("policy", AVERAGE), ema=0.5, grad_clip=1e9, betas=(0.0, 0.0), accumulation=2)
    averages = []
    for step in range(1, 5):
        one.update(step, ROWS)
        averages.append(one.generator.adapters.parameters(AVERAGE)[0][0].item())
    assert averages == pytest.approx([1.0, 0.95, 0.95, 0.875])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_saved_and_loaded_it_goes_on_the_same(tmp_path, accumulation):
    whole, first = learner(accumulation=accumulation), learner(accumulation=accumulation)
    whole.update(1, ROWS)
    first.update(1, ROWS)
    first.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["optimizer_policy.pt", "policy.safetensors"]
    second = learner(accumulation=accumulation)
    second.load(tmp_path)
    assert second.update(2, ROWS) == whole.update(2, ROWS)
