"""Ranks: the processes that train one model together, what they sum, and how a batch is shared among them."""
