"""Name the files that an exported language model has beside what its library knows."""

from __future__ import annotations

#: What an exported folder says of itself; its key `questions` names the file of digests.
FACTS = "segprop.json"
#: Length and digest of every file that an export wrote, so that damage is noticed.
EXPORTED = "segprop_export.json"
#: Digests of the questions that the model was trained on; in the commit of a data node too.
TRAINED_QUESTIONS = "segprop_questions.npz"
