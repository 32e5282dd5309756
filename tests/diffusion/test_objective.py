import pytest
import torch
from torch import nn

from diffusion import Follows, Objective, Scores, Trained, adapter_names, players_of


class Method(Objective):
    adapters = {"old": Follows("policy", 0.5), "fake": Trained(), "policy": Trained()}  # noqa: RUF012
    networks = {"critic": nn.Linear(1, 1)}  # noqa: RUF012


def test_the_policy_is_the_first_player_and_followers_are_none():
    assert players_of(Method()) == ["policy", "fake", "critic"]
    assert list(adapter_names(Method()))[-1] == "old", "leaders come before the ones that follow them"


def test_an_objective_without_a_policy_is_refused():
    class Wrong(Objective):
        adapters = {"student": Trained()}  # noqa: RUF012

    with pytest.raises(AssertionError, match="evaluated and exported"):
        players_of(Wrong())


def test_the_defaults_of_a_method():
    class Plain(Objective):
        pass

    plain = Plain()
    assert players_of(plain) == ["policy"]
    own = torch.randn(3, 2)
    assert plain.noise(0, torch.randn(2), own) is own
    scores = Scores(torch.tensor([1.0, 2.0]), {})
    assert plain.credit(scores) is scores.total
    assert list(plain.turns(1, "items")) == [("policy", "items")]
    for call in (lambda: plain.plan(1, 4), lambda: plain.items(None, None, None), lambda: plain.loss("policy", None, None)):
        with pytest.raises(NotImplementedError):
            call()
