"""The embedded tiny networks: `embedded:glyphs`, the teacher, `embedded:glyphs-clip` and `embedded:glyphs-rewriter`.

networks.py   sizes of the teacher and the CLIP, as classes of diffusers and transformers, and their tokenizer
train.py      the recipe that made the weights: `python -m generators.glyphs.train`
pipeline/     a diffusers folder of the SD3 family
clip/         a transformers CLIPModel folder
rewriter.py   the recipe that made the language model: `python -m generators.glyphs.rewriter`
rewriter/     a transformers folder of a causal language model
"""
