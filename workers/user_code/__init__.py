"""Functions that a user wrote: `source` finds them and says what identifies them, `loading` imports and calls them."""

from workers.user_code.loading import call, load, words_of
from workers.user_code.source import PACKAGE, UserCode, find, module_name, other_source

__all__ = ["PACKAGE", "UserCode", "call", "find", "load", "module_name", "other_source", "words_of"]
