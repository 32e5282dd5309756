"""The embedded tiny teacher: `weights: embedded:glyphs` and `embedded:glyphs-clip`.

networks.py   the sizes of its networks and its tokenizer, as diffusers and transformers build them
train.py      the recipe that made the weights: `python -m generators.glyphs.train`
pipeline/     a diffusers folder of the SD3 family
clip/         a transformers CLIPModel folder
"""
