"""The learner on toy problems: a few weights, and losses whose gradients are known."""

import threading
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from diffusion import Follows, Loss
from runtime.experiment.config import AdamWSection
from runtime.roles.learner import Learner, Player, rate
from runtime.roles.memory import PeakMemory


@dataclass
class Rows:
    x: torch.Tensor

    def __len__(self):
        return len(self.x)

    def __getitem__(self, rows):
        return Rows(self.x[rows])


ROWS = Rows(torch.tensor([1.0, 2.0, 3.0, 6.0, 8.0]))


def weight(*values):
    return nn.Parameter(torch.tensor(values or (1.0, 1.0)))


def learner(micro_batch=64, steps=10, ranks=None, followers=None, others=(), **optimizer):
    section = AdamWSection(**{"lr": 0.1, "weight_decay": 0.0} | optimizer)
    players = {name: Player({"w": weight()}, section) for name in ("policy", *others)}
    return Learner(
        players,
        {name: (follows, {"w": weight()}) for name, follows in (followers or {}).items()},
        steps=steps,
        micro_batch=micro_batch,
        memory=PeakMemory(torch.device("cpu")),
        ranks=ranks,
    )


def mean_prediction(one):
    """The loss x (w_0 + w_1), whose gradient is the mean of x."""

    def loss(player, items, tools):
        value = (items.x * one.players[player].parameters["w"].sum()).mean()
        return Loss(value, {"ratio/max_log": items.x.max(), "ratio/clip_fraction": items.x.mean()})

    return loss


def update(one, items=ROWS, step=1, turns=None, loss=None):
    metrics = one.update(step, turns or [("policy", items)], loss or mean_prediction(one), None)
    return {name: number for name, number in metrics.items() if not name.startswith("memory/")}


def value(one, name="policy"):
    tensors = one.players[name].parameters if name in one.players else one.followers[name][1]
    return tensors["w"].tolist()


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 64])
def test_micro_batches_add_up_to_the_whole(micro_batch):
    one = learner(micro_batch=micro_batch, grad_clip=1e9)
    metrics = update(one)
    assert metrics["grad_norm"] == pytest.approx(4 * 2**0.5)
    assert metrics["loss"] == pytest.approx(8.0)
    assert metrics["ratio/max_log"] == 8
    assert metrics["ratio/clip_fraction"] == pytest.approx(4)
    assert value(one) == pytest.approx([0.9, 0.9])
    assert metrics["adapter_norm"] == pytest.approx(0.9 * 2**0.5)


@pytest.mark.parametrize("micro_batch", [1, 2, 64])
def test_a_metric_of_some_rows_counts_for_these_alone(micro_batch):
    def loss(player, items, tools):
        few = items.x[items.x > 2]
        return Loss(
            (items.x * one.players[player].parameters["w"].sum()).mean(), {"few": few.mean()}, {"few": (items.x > 2).sum()}
        )

    one = learner(micro_batch=micro_batch)
    assert update(one, loss=loss)["few"] == pytest.approx(17 / 3)
    assert "few" not in update(one, Rows(torch.tensor([1.0, 2.0])), loss=loss), "a mean of no row is left out"


def test_without_items_nothing_is_updated():
    one = learner()
    metrics = update(one, ROWS[:0])
    assert metrics == {"loss": 0.0, "grad_norm": 0.0, "adapter_norm": pytest.approx(2**0.5)}
    assert value(one) == [1, 1]


@pytest.mark.parametrize("name", ["policy", "critic"])
def test_a_gradient_that_is_not_finite_stops_before_the_step(name):
    one = learner(others=["critic"])
    with pytest.raises(FloatingPointError, match=f"step 3, {name}"):
        update(one, step=3, turns=[(name, Rows(torch.tensor([float("inf")])))])
    assert value(one, name) == [1.0, 1.0]


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
    config = AdamWSection(schedule=schedule, warmup_steps=warmup)
    assert [rate(step, 4, config) for step in (1, 2, 3, 4)] == pytest.approx(rates)


# --- several updates, several players


def test_updates_of_one_step_are_averaged_and_maxima_are_kept():
    """Reporting only the last update would give 0.1 here instead of the maximum 5."""
    one = learner(grad_clip=1e9, lr=1e-9)
    turns = [("policy", Rows(torch.tensor([5.0, 1.0]))), ("policy", Rows(torch.tensor([0.1])))]
    metrics = update(one, turns=turns)
    assert metrics["ratio/max_log"] == 5
    assert metrics["ratio/clip_fraction"] == pytest.approx(6.1 / 3), "over rows"
    assert metrics["loss"] == pytest.approx(2 * 6.1 / 3)
    assert metrics["grad_norm"] == pytest.approx(2**0.5 * (3 + 0.1) / 2), "over updates"


def test_players_report_under_their_own_names_and_move_alone():
    one = learner(others=["critic"], grad_clip=1e9)
    metrics = update(one, turns=[("critic", Rows(torch.tensor([2.0])))])
    assert (metrics["loss"], metrics["grad_norm"]) == (0, 0)
    assert metrics["critic/loss"] == pytest.approx(4)
    assert metrics["critic/grad_norm"] == pytest.approx(2 * 2**0.5)
    assert (value(one), value(one, "critic")) == ([1, 1], pytest.approx([0.9, 0.9]))
    metrics = update(one, turns=[("critic", Rows(torch.tensor([2.0]))), ("policy", Rows(torch.tensor([3.0])))])
    assert metrics["loss"] == pytest.approx(6)
    assert metrics["adapter_norm"] == pytest.approx(0.9 * 2**0.5), "of the first player"


def test_no_gradient_crosses_from_one_player_to_another():
    one = learner(others=["critic"], grad_clip=1e9)

    def loss(player, items, tools):
        return Loss(one.players["policy"].parameters["w"].sum() * one.players["critic"].parameters["w"].sum())

    update(one, turns=[("policy", ROWS)], loss=loss)
    assert one.players["critic"].parameters["w"].grad is None
    assert value(one, "critic") == [1, 1]


def test_a_players_settings_are_its_own():
    players = {
        "policy": Player({"w": weight()}, AdamWSection(lr=0.1, weight_decay=0)),
        "critic": Player({"w": weight()}, AdamWSection(lr=0.5, weight_decay=0, accumulation=2)),
    }
    one = Learner(players, {}, steps=1, micro_batch=8, memory=PeakMemory(torch.device("cpu")))
    for expected in ([1, 1], [0.5, 0.5]):
        update(one, turns=[("policy", ROWS), ("critic", ROWS)])
        assert value(one, "critic") == pytest.approx(expected, abs=1e-6)
    assert value(one) == pytest.approx([0.8, 0.8], abs=1e-3)


def test_turns_may_hold_disjoint_mini_batches():
    one = learner(grad_clip=1e9)
    update(one, turns=(("policy", ROWS[start : start + 2]) for start in (0, 2, 4)))
    assert value(one) == pytest.approx([0.7, 0.7], abs=0.02), "three steps of Adam"


# --- followers


def test_a_follower_moves_after_its_leader():
    one = learner(followers={"ema": Follows("policy", 0.75)}, grad_clip=1e9)
    update(one)
    assert value(one, "ema") == pytest.approx([0.975, 0.975])


def test_a_follower_does_not_move_before_its_leader():
    one = learner(followers={"old": Follows("policy", 0.5), "critic_ema": Follows("critic", 0.5)}, others=["critic"])
    update(one)
    assert value(one, "critic_ema") == [1, 1]
    assert value(one, "old") == pytest.approx([0.95, 0.95])


def test_a_follower_moves_with_every_step_of_the_optimiser():
    one = learner(followers={"ema": Follows("policy", 0.5)}, grad_clip=1e9, betas=(0.0, 0.0), accumulation=2)
    seen = []
    for step in range(1, 5):
        update(one, step=step)
        seen.append(value(one, "ema")[0])
    assert seen == pytest.approx([1.0, 0.95, 0.95, 0.875])


# --- accumulation, checkpoints, ranks


def test_accumulation_takes_the_mean_gradient_of_several_updates():
    one, twice = learner(grad_clip=1e9, betas=(0.0, 0.0)), learner(grad_clip=1e9, betas=(0.0, 0.0), accumulation=2)
    update(one)
    assert update(twice)["grad_norm"] == pytest.approx(2 * 2**0.5)
    assert value(twice) == [1.0, 1.0]
    assert update(twice, step=2)["grad_norm"] == pytest.approx(4 * 2**0.5)
    assert value(one) == pytest.approx(value(twice))
    assert update(twice, step=3)["grad_norm"] == pytest.approx(update(one, step=2)["grad_norm"] / 2)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_saved_and_loaded_it_continues_the_same(tmp_path, accumulation):
    settings = {"accumulation": accumulation, "others": ["critic"], "followers": {"ema": Follows("policy", 0.5)}}
    whole, first = learner(**settings), learner(**settings)
    turns = [("policy", ROWS), ("critic", ROWS)]
    update(whole, turns=turns)
    update(first, turns=turns)
    first.save(tmp_path)
    names = ["critic.safetensors", "ema.safetensors", "optimizer_critic.pt", "optimizer_policy.pt", "policy.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    second = learner(**settings)
    second.load(tmp_path)
    assert update(second, step=2, turns=turns) == update(whole, step=2, turns=turns)
    assert [value(second, name) for name in ("policy", "critic", "ema")] == [
        value(whole, name) for name in ("policy", "critic", "ema")
    ]


def test_buffers_of_a_network_are_checkpointed(tmp_path):
    def with_buffer(number):
        network = nn.BatchNorm1d(2)
        network.running_mean.fill_(number)
        player = Player(dict(network.named_parameters()), AdamWSection(), dict(network.named_buffers()))
        return Learner({"critic": player}, {}, steps=1, micro_batch=8, memory=PeakMemory(torch.device("cpu"))), network

    (first, _), (second, network) = with_buffer(3.0), with_buffer(0.0)
    first.save(tmp_path)
    second.load(tmp_path)
    assert network.running_mean.tolist() == [3, 3]


def test_a_checkpoint_of_an_earlier_version_calls_the_ema_average(tmp_path):
    one = learner(followers={"ema": Follows("policy", 0.5)})
    update(one)
    one.save(tmp_path)
    (tmp_path / "ema.safetensors").rename(tmp_path / "average.safetensors")
    second = learner(followers={"ema": Follows("policy", 0.5)})
    second.load(tmp_path)
    assert value(second, "ema") == value(one, "ema") != [1, 1]


def test_a_checkpoint_with_other_tensors_is_refused(tmp_path):
    one = learner()
    one.save(tmp_path)
    other = Learner(
        {"policy": Player({"v": weight()}, AdamWSection())}, {}, steps=1, micro_batch=1, memory=PeakMemory(torch.device("cpu"))
    )
    with pytest.raises(ValueError, match=r"policy.safetensors: holds other tensors"):
        other.load(tmp_path)


class Threads:
    """Ranks as threads of one process: sums through a barrier, in the order of the ranks."""

    def __init__(self, number):
        self.number = number
        self.barrier = threading.Barrier(number)
        self.shared = {}

    def rank(self, index):
        outer = self

        class Rank:
            def _all(self, value):
                outer.shared[index] = value
                outer.barrier.wait()
                values = [outer.shared[i] for i in range(outer.number)]
                outer.barrier.wait()
                return values

            def total(self, rows):
                return sum(self._all(rows))

            def passes(self, number):
                return max(self._all(number))

            def add(self, gradients):
                sums = [sum(parts) for parts in zip(*self._all([g.clone() for g in gradients]), strict=True)]
                for gradient, total in zip(gradients, sums, strict=True):
                    gradient.copy_(total)

        return Rank()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_ranks_with_unequal_rows_do_what_one_learner_does_with_all(accumulation):
    """Rank 1 has one micro-batch where rank 0 has two, so it repeats its last one with weight 0."""
    settings = {"micro_batch": 2, "grad_clip": 1e9, "accumulation": accumulation}
    alone = learner(**settings)
    for step in (1, 2):
        update(alone, step=step)
    threads, calls = Threads(2), [0, 0]
    ranks = [learner(**settings, ranks=threads.rank(i)) for i in range(2)]

    def run(index, rows):
        plain = mean_prediction(ranks[index])

        def counted(player, items, tools):
            calls[index] += 1
            return plain(player, items, tools)

        for step in (1, 2):
            update(ranks[index], rows, step=step, loss=counted)

    workers = [threading.Thread(target=run, args=(i, rows)) for i, rows in enumerate((ROWS[:3], ROWS[3:]))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert calls == [4, 4], "every rank makes as many passes as the busiest"
    assert value(ranks[0]) == value(ranks[1]) == pytest.approx(value(alone))
