"""Imported last: garbage collections pass over what is imported by then."""

import gc

gc.collect()
gc.freeze()
