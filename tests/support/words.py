"""Words that the tests' tokenizer spells with one token each."""

WORDS = ("the", "and", "day", "was", "to", "little", "Monday", "Tuesday", "Once", "upon", "time")
