"""The language model of the glyph world and its recipe."""

from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from generators import embedded
from generators.glyphs import rewriter
from worlds.glyphs import HELDOUT_THINGS, parse, random_scene, read_prompts


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def meaning(scene):
    """Equal for captions that the same images satisfy."""
    if len(scene.things) == 2:
        other = scene.things[::-1], rewriter.INVERSE[scene.place]
        return min((scene.things, scene.place), other, key=str)
    return scene.things, scene.place


def test_most_paraphrases_mean_the_same_and_none_has_a_held_out_thing():
    rng = np.random.default_rng(0)
    same, swapped = Counter(), Counter()
    for _ in range(4000):
        scene = random_scene(rng)
        result = parse(rewriter.paraphrase(scene, rng))
        assert not HELDOUT_THINGS & set(result.things)
        if len(scene.things) == 2 and result.things == scene.things[::-1]:
            swapped[scene.place, result.place == rewriter.INVERSE[scene.place]] += 1
        same[meaning(result) == meaning(scene)] += 1
    assert 0.6 < same[True] / same.total() < 0.75
    right = {place: swapped[place, True] / (swapped[place, True] + swapped[place, False]) for place in rewriter.INVERSE}
    assert right == pytest.approx({"left of": 0.35, "right of": 0.35, "above": 0.85, "below": 0.85}, abs=0.08)


def test_without_mistakes_all_of_them_mean_the_same():
    rng = np.random.default_rng(0)
    wordings = Counter()
    for _ in range(500):
        scene = random_scene(rng)
        result = parse(rewriter.paraphrase(scene, rng, mistakes=False))
        placed = scene.place is None and result.things == scene.things  # a thing without a place may be anywhere
        assert placed or meaning(result) == meaning(scene)
        wordings[result == scene] += 1
    assert min(wordings.values()) > 100


def test_every_word_of_the_world_is_one_token():
    tokenizer = rewriter.new_tokenizer()
    text = rewriter.TEMPLATE.format(prompt="a red circle left of a blue seven")
    ids = tokenizer(text).input_ids
    assert len(ids) == 9
    assert tokenizer.decode(ids[:-1]) == "a red circle left of a blue seven"
    assert tokenizer("a crimson circle").input_ids[1] == tokenizer.unk_token_id
    longest = max(len(tokenizer(f"{text} => {text}").input_ids) for text in read_prompts("train"))
    assert longest < rewriter.MAX_TOKENS


def test_the_recipe_is_reproducible_and_learns():
    one, other = (rewriter.pretrain(steps=3, seed=1)[0].state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    model, tokenizer = rewriter.pretrain(steps=60, seed=0)
    loss = rewriter.batch_loss(model, tokenizer, np.random.default_rng(5)).item()
    assert loss < 2.5  # log(42) = 3.7 at the start


def test_the_embedded_model_writes_valid_captions_and_makes_mistakes():
    folder = embedded("embedded:glyphs-rewriter")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1_000_000
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = [text for text in read_prompts("evaluation") if len(parse(text).things) == 2][:40]
    tokens = tokenizer([rewriter.TEMPLATE.format(prompt=text) for text in texts], return_tensors="pt", padding=True)
    ids = model.generate(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, max_new_tokens=12, do_sample=False)
    written = tokenizer.batch_decode(ids[:, tokens.input_ids.shape[1] :], skip_special_tokens=True)
    right = sum(meaning(parse(one)) == meaning(parse(text)) for one, text in zip(written, texts, strict=True))
    assert 4 < right < 36
