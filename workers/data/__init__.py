"""Data sets: inspected without torch, decoded once into the store, augmented in batches."""
