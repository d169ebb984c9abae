"""A model family as another package would bring it; see `installed_family`."""
