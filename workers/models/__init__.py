"""Model families: each gives a pure outline (no torch) and builds the parts of its chain."""
