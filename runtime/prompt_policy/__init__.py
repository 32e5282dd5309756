"""`odeon prompt-policy`: a language model learns to rewrite prompts with TRL's trainer. Knows nothing of align/ or distill/."""
