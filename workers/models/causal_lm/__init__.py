"""Hugging Face decoders as chains: `embed`, `layer0` … `layer<n-1>`, `head`. See docs/design/005-causal-lm.md.

Nothing is imported here: planning takes `outline` alone, which needs neither torch nor transformers.

A line may import from the lines below it, never from those above, lazily neither:

- family: the row of the table of families; survey: tries every architecture of transformers
- inspect: what a model is, without its weights; training: its parts as the training code asks for them
- trials/: what only running a small model of the kind tells (its chain is right, it keeps documents apart)
- pretrained/: configurations and weight files, in and out
- memory: bytes of a stage
- network/: the model as parts that run
- counting: figures of parts
- outline, errors
"""
