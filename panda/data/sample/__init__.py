"""The small data sets and the tokenizer that ship with panda, so that it runs offline out of the box."""
