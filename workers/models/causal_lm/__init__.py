"""Hugging Face decoders as chains: `embed`, `layer0` … `layer<n-1>`, `head`. See docs/design/005-causal-lm.md.

Nothing is imported here: planning takes `outline` alone, which needs neither torch nor transformers.
"""
