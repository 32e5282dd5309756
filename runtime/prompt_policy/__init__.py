"""`odeon prompt-policy`: a language model learns to rewrite prompts with TRL's trainer. Independent of align/ and distill/."""
