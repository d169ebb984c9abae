"""Text as token sequences: found and described (`inspect`), tokenized once (`prepare`), read (`source`)."""
