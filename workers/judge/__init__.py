"""Judging finished language models: public benchmarks on a Hugging Face folder, generated code in a jail."""
