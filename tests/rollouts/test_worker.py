"""The worker on a flow whose every solution is known, and bit for bit on a small random pipeline."""

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from diffusion import SOLVERS, Condition, Group, Plan, Prompt, RectifiedFlow, sample_noise, sample_seed
from generators.families.sd3.generator import SD3Generator
from generators.glyphs import networks
from rollouts import Worker, seed_groups
from rollouts.worker import group_noise, groups_of_a_micro_batch, guidance_of, micro_batch_rows, seed_teacher_groups

PROMPTS = [Prompt("a", "one"), Prompt("b", "three"), Prompt("c", "a longer one")]
SPREAD = 0.5
SHAPE = (3, 2, 2)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small lose up to 200 times their own time to threads that wait for a busy core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class GaussianFlow:
    """Data around the length of the prompt with a spread of 1/2, so noise n ends at length + n / 2; the policy is 1 higher."""

    path = RectifiedFlow()
    device = torch.device("cpu")

    def __init__(self):
        self.encoded, self.rows = [], 0
        self.weight = torch.ones(1, requires_grad=True)

    def __call__(self, x, t, condition, adapter):
        self.rows += len(x)
        mean = condition.tensors["mean"][:, None, None, None] + (1 if adapter == "policy" else 0)
        t = t.to(x.dtype)
        away = (x - (1 - t) * mean) / ((1 - t) ** 2 * SPREAD**2 + t**2)
        return self.weight * (t * away - mean - (1 - t) * SPREAD**2 * away)

    def encode(self, prompts):
        self.encoded.append(list(prompts))
        return Condition({"mean": torch.tensor([float(len(text)) for text in prompts])})

    def decode(self, latents):
        return latents.sigmoid()


@pytest.fixture
def flow():
    return GaussianFlow()


def worker(generator, steps=8, **options):
    grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    settings = {"solver": SOLVERS["heun"], "grid": grid, "shape": SHAPE, "most": 4} | options
    return Worker(generator, **settings)


def take(drawer, some=None, **plan):
    """(rollout, images) of groups of one size; the teacher's unless the plan says otherwise."""
    some = groups() if some is None else some
    drawn = drawer.take(some, Plan(**{"source": "teacher", "group_size": len(some[0].seeds)} | plan))
    return drawn.rollout, drawn.images


def groups(size=3):
    return seed_groups(PROMPTS, size, run_seed=7, iteration=2)


def ends(rollout):
    return rollout.trajectory.x[:, -1]


def lengths(size=3, plus=0.0):
    return torch.tensor([len(p.text) + plus for p in PROMPTS]).repeat_interleave(size)[:, None, None, None]


def test_seeds_are_hashes_of_run_iteration_prompt_and_place():
    for group, prompt in zip(groups(), PROMPTS, strict=True):
        assert group.prompt is prompt
        assert group.seeds == [sample_seed(7, 2, prompt.id, i) for i in range(3)]
        assert group.seed == sample_seed(7, 2, prompt.id, -1)


def test_a_prompt_that_comes_twice_gets_other_seeds():
    twice = seed_groups([PROMPTS[0], PROMPTS[1], PROMPTS[0]], 2, 0, 1)
    assert len({seed for group in twice for seed in (group.seed, *group.seeds)}) == 9
    assert twice[:2] == seed_groups(PROMPTS[:2], 2, 0, 1)


def test_noise_goes_where_the_flow_takes_it(flow):
    rollout, images = take(worker(flow, steps=64))
    noise = sample_noise(rollout.seeds, SHAPE)
    assert torch.allclose(ends(rollout), lengths() + SPREAD * noise, atol=5e-3)
    assert torch.equal(images, flow.decode(ends(rollout)))


def test_what_is_in_a_rollout(flow):
    drawn = [Group(PROMPTS[1], 5, [1, 2]), Group(PROMPTS[0], 6, [3, 7]), Group(PROMPTS[2], 7, [4, 8])]
    rollout, images = take(worker(flow), drawn)
    assert [prompt.id for prompt in rollout.prompts] == ["b", "a", "c"]
    assert [prompt.id for prompt in rollout.sample_prompts] == ["b", "b", "a", "a", "c", "c"]
    assert rollout.group.tolist() == [0, 0, 1, 1, 2, 2]
    assert rollout.seeds.tolist() == [1, 2, 3, 7, 4, 8]
    assert rollout.condition.tensors["mean"].tolist() == [5, 3, 12], "one for each group"
    assert rollout.trajectory.x.shape == (6, 1, *SHAPE)
    assert rollout.trajectory.t.tolist() == [0]
    assert rollout.trajectory.prediction is None
    assert images.shape == (6, 3, 2, 2)
    assert rollout.version is None
    assert flow.encoded == [["three", "one", "a longer one"]], "every prompt is encoded once"


def test_the_policy_and_the_teacher(flow):
    teacher, _ = take(worker(flow))
    policy, _ = take(worker(flow), source="policy")
    assert torch.equal(policy.seeds, teacher.seeds)
    assert torch.allclose(ends(policy) - ends(teacher), torch.ones(9, *SHAPE), atol=1e-5)
    other, _ = take(worker(flow), source="policy", adapter="old")
    assert torch.equal(ends(other), ends(teacher)), "this flow's other adapters change nothing"


def test_noise_alone_is_handed_out_without_a_network_call(flow):
    drawer = worker(flow)
    rollout, images = take(drawer, source="noise", scored=False)
    assert drawer.take(groups(), Plan(source="noise", group_size=3, scored=False)).nfe == 0
    assert images is None
    assert rollout.trajectory.t.tolist() == [1]
    assert torch.equal(rollout.trajectory.x[:, 0], sample_noise(rollout.seeds, SHAPE))
    assert flow.rows == 0


def test_a_plan_without_scores_decodes_nothing(flow, monkeypatch):
    monkeypatch.setattr(GaussianFlow, "decode", lambda self, latents: pytest.fail("decoded"))
    rollout, images = take(worker(flow), scored=False, record=range(9), predictions=True)
    assert images is None
    assert rollout.trajectory.x.shape == (9, 9, *SHAPE)
    assert rollout.trajectory.prediction.shape == (9, 8, *SHAPE)


def test_no_gradient(flow):
    rollout, images = take(worker(flow))
    assert not images.requires_grad
    assert not rollout.trajectory.x.requires_grad
    assert not images.is_inference(), "the learner puts these states into a graph"


@pytest.mark.parametrize("record", [[0, 3, 8], [8], [5, 2], range(9), [0]])
def test_the_states_asked_for_and_no_others(flow, record):
    rollout, images = take(worker(flow), record=record, predictions=True)
    whole, all_images = take(worker(flow), record=range(9), predictions=True)
    assert rollout.trajectory.t.tolist() == [1 - i / 8 for i in sorted(record)]
    assert torch.equal(rollout.trajectory.x, whole.trajectory.x[:, sorted(record)])
    asked = [i for i in sorted(record) if i < 8]
    found = rollout.trajectory.prediction
    assert found is None if not asked else torch.equal(found, whole.trajectory.prediction[:, asked])
    assert torch.equal(images, all_images)
    assert torch.equal(whole.trajectory.x[:, 0], sample_noise(whole.seeds, SHAPE))


def test_the_objective_chooses_the_noise_of_a_whole_group(flow):
    def shared_by_all(draw, shared, own):
        return shared.expand_as(own)

    rollout, _ = take(worker(flow, noise=shared_by_all))
    by_group = ends(rollout).unflatten(0, (3, 3))
    assert torch.equal(by_group, by_group[:, :1].expand_as(by_group))
    assert not torch.equal(by_group[0, 0], by_group[1, 0])


def test_a_groups_draws_are_independent_and_repeatable():
    seen = []

    def noise(draw, shared, own):
        seen.append((draw, shared, own))
        return own

    group = Group(PROMPTS[0], 5, [1, 2])
    first, second, again = (group_noise(group, draw, SHAPE, noise) for draw in (0, 1, 1))
    assert torch.equal(first, sample_noise([1, 2], SHAPE))
    assert torch.equal(seen[0][1], sample_noise([5], SHAPE)[0])
    assert torch.equal(second, again)
    assert not torch.equal(second, first)
    assert not torch.equal(seen[1][1], seen[0][1])
    assert [draw for draw, *_ in seen] == [0, 1, 1]


def test_noisy_steps_have_the_objective_s_noise_of_their_own(flow):
    draws = []

    def noise(draw, shared, own):
        draws.append(draw)
        return own

    rollout, _ = take(worker(flow, noise=noise), noisy=[2], record=[2, 3])
    assert draws == [0, 0, 0, 3, 3, 3], "a draw for each group: the initial noise, then that of step 2"
    fresh = torch.cat([group_noise(group, 3, SHAPE, lambda draw, shared, own: own) for group in groups()])
    x, t, s = rollout.trajectory.x[:, 0], torch.tensor(0.75), torch.tensor(0.625)
    condition = rollout.condition[rollout.group]
    clean = x - t * GaussianFlow()(x, t, condition, None).detach()
    assert torch.allclose(rollout.trajectory.x[:, 1], (1 - s) * clean + s * fresh, atol=1e-5)


def test_guidance_moves_away_from_the_negative_prompt(flow):
    """The velocity is linear in the mean, so guidance 3 away from a mean of 2 is a mean of 2 + 3 (length - 2)."""
    guided, _ = take(worker(flow, steps=64, guidance=3.0, negative="no"))
    expected = 2 + 3 * (lengths() - 2) + SPREAD * sample_noise(guided.seeds, SHAPE)
    assert torch.allclose(ends(guided), expected, atol=5e-2)


@pytest.mark.parametrize(
    ("solver", "guidance", "noisy", "nfe"),
    [("euler", 1.0, [], 8), ("heun", 1.0, [], 15), ("dpmpp_2m", 4.0, [], 16), ("heun", 4.0, [], 30), ("heun", 4.0, [1, 7], 28)],
)
def test_network_evaluations(flow, solver, guidance, noisy, nfe):
    drawer = worker(flow, solver=SOLVERS[solver], guidance=guidance)
    drawn = drawer.take(groups(size=4), Plan(source="teacher", group_size=4, noisy=noisy))  # three full batches of 4
    assert drawn.nfe == 12 * nfe
    assert flow.rows == 12 * nfe


@pytest.mark.parametrize(
    ("group", "most", "rows"), [(12, 64, 60), (12, 12, 12), (12, 5, 4), (12, 1, 1), (2, 64, 64), (7, 6, 1)]
)
def test_micro_batches_never_cut_a_group_unevenly(group, most, rows):
    assert micro_batch_rows(group, most) == rows
    assert groups_of_a_micro_batch(group, most) == max(1, rows // group)


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    """The glyph world's own networks with random weights, larger than diffusers' first ones, so that everything matters."""
    torch.manual_seed(0)
    tokenizer = networks.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    pipeline = StableDiffusion3Pipeline(
        transformer=networks.new_transformer(),
        scheduler=networks.new_scheduler(),
        vae=networks.new_vae(),
        text_encoder=networks.new_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=networks.new_text_encoder(tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    for network in (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2):
        for parameter in network.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.8 * parameter.shape[1] ** -0.5)
    pipeline.vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    return SD3Generator(pipeline, max_sequence_length=0)


def sd3_worker(sd3, **options):
    grid, shape = sd3.time_grid(3), sd3.latent_shape()
    return Worker(sd3, solver=SOLVERS["dpmpp_2m"], grid=grid, shape=shape, **options)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("most", [1, 4, 16])
def test_a_group_is_the_same_to_the_last_bit_whatever_else_is_drawn(sd3, most, guidance):
    drawer = sd3_worker(sd3, most=most, guidance=guidance)
    prompts = [Prompt(str(i), text) for i, text in enumerate(["a red circle", "a blue seven", "", "a white cross at the top"])]
    drawn = seed_groups(prompts, 3, 0, 1)
    together, images = take(drawer, drawn, record=range(4))
    assert (images[0] - images[3]).abs().max() > 0.01
    for order in ([0], [2], [3, 1], [1, 2, 3, 0]):
        some, some_images = take(drawer, [drawn[i] for i in order], record=range(4))
        rows = [row for i in order for row in range(3 * i, 3 * i + 3)]
        assert torch.equal(some_images, images[rows])
        assert torch.equal(some.trajectory.x, together.trajectory.x[rows])


def test_another_micro_batch_gives_the_same_up_to_rounding(sd3):
    drawn = seed_groups([Prompt("1", "a red circle"), Prompt("2", "a blue seven")], 3, 0, 1)
    small, large = (take(sd3_worker(sd3, most=m), drawn)[1] for m in (1, 8))
    assert torch.allclose(small, large, atol=1e-4)


def test_the_teachers_noise_repeats_after_the_given_number_of_passes():
    prompts = [Prompt("a", "a"), Prompt("b", "b"), Prompt("a", "a")]
    first, second, third = (seed_teacher_groups(prompts, [0, 0, 1 + n], 1, seed=3, noises=2) for n in range(3))
    assert first[0].seeds != first[2].seeds, "another pass, another noise"
    assert second[0].seeds == second[2].seeds, "pass 2 is pass 0 again"
    assert third[2].seeds == first[2].seeds
    assert seed_teacher_groups(prompts, [0, 0, 0], 1, seed=4, noises=2)[0].seeds != first[0].seeds


def test_a_guidance_range_gives_each_group_its_own_scale():
    groups = [Group(Prompt(str(i), "x"), i, [i]) for i in range(300)]
    scales = torch.tensor([guidance_of(group, (2.0, 4.0)) for group in groups])
    assert scales.min() >= 2
    assert scales.max() <= 4
    assert scales.mean().item() == pytest.approx(3, abs=0.15)
    assert guidance_of(groups[0], (2.5, 2.5)) == 2.5


def test_a_group_drawn_with_a_guidance_range_is_the_one_drawn_with_its_own_scale(flow):
    some = groups(2)
    rollout, _ = take(worker(flow, guidance=(1.5, 4.0)), some, scored=False)
    for i, group in enumerate(some):
        alone, _ = take(worker(flow, guidance=guidance_of(group, (1.5, 4.0))), [group], scored=False)
        torch.testing.assert_close(ends(rollout)[2 * i : 2 * i + 2], ends(alone), rtol=1e-4, atol=1e-5)


def test_the_consistency_solver_draws_noise_for_every_step_but_the_last(flow):
    some = groups(2)
    drawer = worker(flow, steps=3, solver=SOLVERS["consistency"])
    rollout, _ = take(drawer, some, record="all")
    assert rollout.trajectory.x.shape[1] == 4
    assert drawer.evaluations(Plan(source="teacher")) == 3
    noise = torch.cat([group_noise(group, 2, SHAPE, lambda draw, shared, own: own) for group in some])
    condition = flow.encode([group.prompt.text for group in some])[rollout.group]
    x, t = rollout.trajectory.x[:, 1], rollout.trajectory.t
    clean = x - t[1] * flow(x, t[1], condition, None)
    expected = (1 - t[2]) * clean + t[2] * noise
    torch.testing.assert_close(rollout.trajectory.x[:, 2], expected.float().detach(), rtol=1e-4, atol=1e-5)
