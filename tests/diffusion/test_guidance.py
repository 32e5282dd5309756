import pytest
import torch

from diffusion import Condition, guidance_evaluations, guide, guided


class Network:
    """Adds the condition to the state, times a weight; records its calls."""

    def __init__(self):
        self.weight = torch.ones((), requires_grad=True)
        self.calls = []

    def __call__(self, x, t, condition, adapter):
        self.calls.append((x.shape[0], t.tolist(), adapter, torch.is_grad_enabled()))
        return self.weight * (x + condition.tensors["c"][:, None])


X, T = torch.zeros(2, 3), torch.tensor(0.5, dtype=torch.float64)
POSITIVE, NEGATIVE = Condition({"c": torch.tensor([1.0, 2.0])}), Condition({"c": torch.tensor([10.0, 20.0])})


def test_guide_by_hand():
    assert guide(torch.tensor(3.0), torch.tensor(1.0), 4.5).item() == 10.0
    assert guide(torch.tensor(3.0), torch.tensor(1.0), 0.0).item() == 1.0


def test_scale_one_is_one_call_without_negative():
    network = Network()
    predict = guided(network, POSITIVE, adapter="policy")
    assert predict(X, T)[:, 0].tolist() == [1.0, 2.0]
    assert network.calls == [(2, 0.5, "policy", True)]


def test_guidance_is_one_call_with_both_branches():
    network = Network()
    predict = guided(network, POSITIVE, adapter=None, scale=3.0, negative=NEGATIVE)
    assert predict(X, T)[:, 0].tolist() == [10 - 27, 20 - 54]
    assert network.calls == [(4, 0.5, None, True)]


def test_a_time_per_sample_reaches_both_branches():
    network = Network()
    guided(network, POSITIVE, adapter=None, scale=3.0, negative=NEGATIVE)(X, torch.tensor([0.5, 0.25]))
    assert network.calls == [(4, [0.5, 0.25, 0.5, 0.25], None, True)]


@pytest.mark.parametrize(("detach", "gradient"), [(False, 10 - 27), (True, 3.0)])
def test_detaching_the_negative_branch_changes_the_gradient_only(detach, gradient):
    network = Network()
    predict = guided(network, POSITIVE, adapter=None, scale=3.0, negative=NEGATIVE, detach_negative=detach)
    prediction = predict(X, T)
    assert prediction[:, 0].tolist() == [10 - 27, 20 - 54]
    prediction[0, 0].backward()
    assert network.weight.grad.item() == gradient


def test_the_detached_branch_stores_no_activations():
    network = Network()
    guided(network, POSITIVE, adapter=None, scale=3.0, negative=NEGATIVE, detach_negative=True)(X, T)
    assert network.calls == [(2, 0.5, None, False), (2, 0.5, None, True)]


@pytest.mark.parametrize("scale", [1.0, 0.0, 4.5])
def test_evaluations_are_rows_per_sample(scale):
    network = Network()
    guided(network, POSITIVE, adapter=None, scale=scale, negative=NEGATIVE)(X, T)
    assert network.calls[0][0] == 2 * guidance_evaluations(scale)


@pytest.mark.parametrize(("negative", "rows"), [(None, 0), (NEGATIVE[[0]], 1)])
def test_guidance_without_its_negative_conditions_is_refused(negative, rows):
    with pytest.raises(ValueError, match=f"needs 2 negative conditions, one for each sample, got {rows}"):
        guided(Network(), POSITIVE, adapter=None, scale=2.0, negative=negative)
