"""Turn rows into tokens and batches: collators, samplers and streams.

`collators.py` masks and labels cells; `collate.py` pads and packs them. `draws.py` says which rows an epoch reads;
`samplers.py` (at random, in blocks), `length_sampler.py` (by length, and the base class of all samplers) and
`token_budget.py` (by tokens) order them.
"""
