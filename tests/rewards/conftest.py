"""A small CLIPModel with random weights, as a folder of transformers' own layout."""

from pathlib import Path

import pytest
import torch
from transformers import CLIPImageProcessorPil

from generators.glyphs import networks


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small lose up to 200 times their own time to threads that wait for a busy core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    """Weights larger than transformers' own first ones, so that pictures and captions matter."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    clip = networks.new_clip(networks.write_tokenizer(folder))
    for parameter in clip.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.8 * parameter.shape[1] ** -0.5)
    clip.save_pretrained(folder)
    side = networks.IMAGE_SIZE
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(folder)
    return folder
