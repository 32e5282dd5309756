"""The embedded tiny networks: `weights: embedded:glyphs`, the teacher, `embedded:glyphs-clip` and `embedded:glyphs-rewriter`.

networks.py   the sizes of its networks and its tokenizer, as diffusers and transformers build them
train.py      the recipe that made the weights: `python -m generators.glyphs.train`
pipeline/     a diffusers folder of the SD3 family
clip/         a transformers CLIPModel folder
rewriter.py   the recipe that made the language model: `python -m generators.glyphs.rewriter`
rewriter/     a transformers folder of a causal language model
"""
