"""Imported last: what every forked run needs is there by then, and garbage collections pass it
over."""

import gc

from mixlora_exp.records.code_hash import code_sha256

code_sha256()  # A second for each run otherwise.
gc.collect()
gc.freeze()
