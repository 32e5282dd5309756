from dataclasses import replace

import pytest
import torch

from diffusion import sample_noise
from generators.adapter_weights import AdapterWeights
from generators.families.sd3.generator import SD3Generator
from generators.lora import Adapters


@pytest.fixture
def adapters(generator) -> Adapters:
    """`policy` and `old` on the transformer, of equal shape and different weights."""
    for name in ("policy", "old"):
        generator.adapters.add(name, rank=4, alpha=8, targets=["attn", "ff"], trainable=name == "policy")
    return generator.adapters


@pytest.fixture
def predict(generator):
    x, condition = sample_noise([1, 2], generator.latent_shape()), generator.encode(["a red circle", "a blue seven"])
    return lambda adapter: generator(x, torch.tensor(0.6), condition, adapter)


def flags(network) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in network.named_parameters()}


def test_a_new_adapter_changes_nothing_bit_for_bit(generator, predict):
    base = predict(None)
    generator.adapters.add("policy", rank=4, alpha=8, targets="all-linear")
    assert torch.equal(predict("policy"), base)
    assert torch.equal(predict(None), base)


def test_no_adapter_is_the_base_bit_for_bit(generator, predict, randomize):
    base = predict(None)
    generator.adapters.add("policy", rank=4, alpha=8)
    randomize(generator, "policy")
    assert (predict("policy") - base).abs().max() > 0.01
    assert torch.equal(predict(None), base)


def test_adapters_on_different_layers(generator, predict, randomize):
    generator.adapters.add("policy", rank=4, alpha=8, targets="attn")
    generator.adapters.add("fake_score", rank=2, alpha=2, targets="ff")
    randomize(generator, "policy")
    assert generator.adapters.names == ("policy", "fake_score")
    assert torch.equal(predict("fake_score"), predict(None))
    assert not torch.equal(predict("policy"), predict(None))


def test_scale_is_alpha_over_rank(generator):
    generator.adapters.add("policy", rank=4, alpha=2, targets="transformer_blocks.0.attn.to_q")
    a, b = generator.adapters.parameters("policy")
    b.data.normal_(generator=torch.Generator().manual_seed(0))
    layer = generator.transformer.get_submodule("transformer_blocks.0.attn.to_q")
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    with generator.adapters.using("policy"):
        torch.testing.assert_close(layer(x), layer.base_layer(x) + 0.5 * x @ a.T @ b.T)


def test_initial_values_depend_on_the_seed_alone(generator, new_pipeline):
    other = SD3Generator(new_pipeline(shift=3.0), max_sequence_length=0)
    before = torch.get_rng_state()
    for g, noise in ((generator, 1), (other, 2)):
        g.adapters.add("policy", rank=4, alpha=8, seed=3)
        torch.manual_seed(noise)
        g.adapters.add("again", rank=4, alpha=8, seed=3)
        g.adapters.add("another", rank=4, alpha=8, seed=4)
    torch.set_rng_state(before)
    digests = {g.adapters.read(name).digest for g in (generator, other) for name in ("policy", "again")}
    assert digests == {generator.adapters.read("policy").digest}
    assert generator.adapters.read("another").digest not in digests
    for key, parameter in generator.adapters.named_parameters("policy").items():
        if ".lora_B." in key:
            assert not parameter.any()
        else:
            bound = parameter.shape[1] ** -0.5
            assert 0.5 * bound < parameter.abs().max() <= bound


def test_adding_does_not_touch_the_global_random_state(generator):
    before = torch.get_rng_state()
    generator.adapters.add("policy", rank=4, alpha=8)
    assert torch.equal(torch.get_rng_state(), before)


def test_only_trainable_adapters_require_gradients(generator, adapters):
    trained = {name for name, requires_grad in flags(generator.transformer).items() if requires_grad}
    assert trained == {name for name in flags(generator.transformer) if ".policy." in name}
    assert len(trained) == len(adapters.parameters("policy"))


def test_switching_never_touches_requires_grad(generator, adapters, predict):
    before = flags(generator.transformer)
    with adapters.using("old"), adapters.using(None), adapters.using("policy"):
        assert flags(generator.transformer) == before
    predict("policy")
    predict(None)
    adapters.add("ema", rank=4, alpha=8, trainable=False)
    after = flags(generator.transformer)
    assert {name: after[name] for name in before} == before


def test_using_nests_and_restores_after_an_error(adapters):
    def fail():
        with adapters.using("old"):
            with adapters.using(None):
                assert adapters.active is None
            assert adapters.active == "old"
            raise RuntimeError("inside")

    assert adapters.active is None
    with adapters.using("policy"):
        with pytest.raises(RuntimeError, match="inside"):
            fail()
        assert adapters.active == "policy"
        adapters.add("late", rank=1, alpha=1)
        assert adapters.active == "policy"
    assert adapters.active is None


def test_restored_adapter_predicts_again(generator, adapters, predict, randomize):
    randomize(generator, "policy")
    randomize(generator, "old", seed=1)
    policy, old = predict("policy"), predict("old")
    assert not torch.equal(policy, old)
    with adapters.using("old"):
        predict(None)
        assert torch.equal(predict(adapters.active), old)
    assert torch.equal(predict("policy"), policy)


@pytest.fixture
def policy_gradient(new_pipeline, randomize):
    """The policy's gradient as one vector, with an adapter of choice active in backward."""

    def gradient(in_backward: str | None, ours: bool = False, diffusers: bool = False) -> torch.Tensor:
        generator = SD3Generator(new_pipeline(), max_sequence_length=0, gradient_checkpointing=ours)
        if diffusers:
            generator.transformer.enable_gradient_checkpointing()
        for seed, name in enumerate(("policy", "old")):
            generator.adapters.add(name, rank=4, alpha=8)
            randomize(generator, name, seed)
        x, condition = sample_noise([1], generator.latent_shape()), generator.encode(["a red circle"])
        loss = (generator(x, torch.tensor(0.6), condition, "policy") ** 2).sum()
        with generator.adapters.using(in_backward):
            loss.backward()
        parameters = generator.adapters.parameters("policy")
        return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])

    return gradient


@pytest.mark.parametrize("in_backward", [None, "old", "policy"])
def test_checkpointing_recomputes_under_the_adapter_of_the_forward(policy_gradient, in_backward):
    plain = policy_gradient(in_backward)
    assert plain.abs().max() > 0.1
    assert torch.equal(policy_gradient(in_backward, ours=True), plain)


def test_checkpointing_of_diffusers_does_not(policy_gradient):
    """The reason for `Adapters.checkpoint`; if this test fails, it is no longer needed."""
    assert not torch.allclose(policy_gradient("old", diffusers=True), policy_gradient("old"))


def test_flat_buffer_round_trip_is_bit_exact(generator, adapters, predict, randomize):
    randomize(generator, "policy")
    weights = adapters.read("policy")
    before, parameters = predict("policy"), adapters.parameters("old")
    adapters.write("old", weights)
    assert torch.equal(predict("old"), before)
    assert [id(p) for p in adapters.parameters("old")] == [id(p) for p in parameters]
    assert adapters.read("old").digest == weights.digest
    assert (weights.buffer.dtype, weights.buffer.ndim, weights.buffer.is_contiguous()) == (torch.float32, 1, True)
    assert weights.manifest[0] == ("transformer_blocks.0.attn.to_q.lora_A.weight", (4, 32), 0)
    assert weights.manifest[1].offset == 4 * 32
    assert sum(torch.Size(entry.shape).numel() for entry in weights.manifest) == len(weights.buffer)


def test_read_is_a_copy(generator, adapters, randomize):
    weights = adapters.read("policy")
    randomize(generator, "policy")
    assert adapters.read("policy").digest != weights.digest
    weights.check_for(weights.manifest, 8, torch.float32)


def test_the_digest_detects_one_changed_bit(adapters):
    weights = adapters.read("policy")
    weights.buffer.view(torch.uint8)[1234] ^= 1
    with pytest.raises(ValueError, match=r"damaged weights: digest [0-9a-f]{12}\.\.\., expected"):
        adapters.write("old", weights)


def test_the_digest_covers_alpha_and_names():
    one = AdapterWeights.pack({"a": torch.ones(2)}, 1.0)
    assert one.digest == AdapterWeights.pack({"a": torch.ones(2)}, 1.0).digest
    assert one.digest == AdapterWeights.pack({"a": torch.ones(2)}, 1).digest  # YAML may say either
    others = [AdapterWeights.pack({"a": torch.ones(2)}, 2.0), AdapterWeights.pack({"b": torch.ones(2)}, 1.0)]
    assert one.digest not in {other.digest for other in others}


def test_weights_of_another_adapter_are_refused(generator, adapters, randomize):
    before = adapters.read("old").digest
    adapters.add("wide", rank=8, alpha=8, targets=["attn", "ff"])
    adapters.add("attention", rank=4, alpha=8, targets="attn")
    adapters.add("louder", rank=4, alpha=16, targets=["attn", "ff"])
    with pytest.raises(ValueError, match=r"74 of another shape \(.*to_q.lora_A.weight \(8, 32\), expected \(4, 32\)"):
        adapters.write("old", adapters.read("wide"))
    with pytest.raises(ValueError, match=r"20 missing \(transformer_blocks.0.ff.net.0.proj.lora_A.weight, "):
        adapters.write("old", adapters.read("attention"))
    with pytest.raises(ValueError, match=r"20 unexpected \(transformer_blocks.0.ff"):
        adapters.write("attention", adapters.read("old"))
    with pytest.raises(ValueError, match=r"alpha 16 in torch.float32, expected alpha 8 in torch.float32"):
        adapters.write("old", adapters.read("louder"))
    weights = adapters.read("policy")
    with pytest.raises(ValueError, match="weights of another adapter: the order differs"):
        adapters.write("old", replace(weights, manifest=weights.manifest[::-1]))
    assert adapters.read("old").digest == before


def test_copy_between_adapters(generator, adapters, randomize):
    randomize(generator, "policy")
    adapters.copy("policy", "old")
    assert adapters.read("old").digest == adapters.read("policy").digest
    adapters.add("other", rank=2, alpha=8)
    with pytest.raises(ValueError, match="adapters 'policy' and 'other': rank, alpha or targets differ"):
        adapters.copy("policy", "other")


@pytest.mark.parametrize(
    ("targets", "number"),
    [
        ("attn", 8 + 4 + 8 + 7),  # the last block has no to_add_out
        ("ff", 4 + 4 + 2),
        ("mlp", 4 + 4 + 2),
        (["attn", "ff"], 37),
        ("all-linear", 50),
        ("to_q", 4),
        (["attn.to_q", "attn2.to_q"], 4),
        ("transformer_blocks.0.attn.to_q", 1),
        (r"transformer_blocks\.[01]\.attn\.to_[kv]", 4),
        (["proj_out", "proj_out"], 1),
    ],
    ids=str,
)
def test_targets(generator, targets, number):
    assert len(generator.adapters.match(targets)) == number


def test_an_unknown_target_names_the_allowed_ones(generator):
    with pytest.raises(ValueError, match=r"target 'atn': matches no linear layer; did you mean 'attn'\?") as error:
        generator.adapters.add("policy", rank=4, alpha=8, targets=["ff", "atn"])
    allowed = str(error.value).split("(allowed: ")[1].split(")")[0].split(", ")
    assert {"attn", "ff", "mlp", "all-linear", "to_q"} <= set(allowed)
    assert "transformer_blocks.N.attn.to_q" in str(error.value)
    assert "\n" not in str(error.value)
    assert generator.adapters.names == ()
    with pytest.raises(ValueError, match=r"target 'to_\(q': not a valid pattern"):
        generator.adapters.match("to_(q")
    with pytest.raises(ValueError, match=r"targets \(\): at least one is needed, for example 'attn'"):
        generator.adapters.match(())


def test_wrong_names_and_sizes(adapters):
    with pytest.raises(ValueError, match="adapter 'policy': exists already"):
        adapters.add("policy", rank=4, alpha=8)
    with pytest.raises(ValueError, match=r"adapter 'new': rank 0, alpha 8 \(allowed: rank >= 1, alpha > 0\)"):
        adapters.add("new", rank=0, alpha=8)
    with pytest.raises(ValueError, match="adapter 'new': rank 4, alpha nan"):
        adapters.add("new", rank=4, alpha=float("nan"))
    with pytest.raises(ValueError, match=r"adapter 'new\.1': the name has a dot"):
        adapters.add("new.1", rank=4, alpha=8)
    expected = r"adapter 'polcy': does not exist; did you mean 'policy'\? \(allowed: old, policy\)"
    with pytest.raises(ValueError, match=expected), adapters.using("polcy"):
        pass
    with pytest.raises(ValueError, match="adapter 'new': does not exist"):
        adapters.parameters("new")


def test_an_optimizer_step_moves_the_policy_only(generator, adapters, predict, randomize):
    randomize(generator, "policy")
    base, old, policy = predict(None), predict("old"), predict("policy").detach()
    optimizer = torch.optim.SGD(adapters.parameters("policy"), lr=0.01)
    predict("policy").square().mean().backward()
    optimizer.step()
    assert torch.equal(predict(None), base)
    assert torch.equal(predict("old"), old)
    assert not torch.equal(predict("policy"), policy)
