"""What frozen encoders make of a data set, computed once and kept by content.

An item's key is the hash of what goes into the encoder (``keys``): the file's bytes with the bucket and how frames are chosen, or
the caption's text.  It lies in the folder of the encoder and its fingerprint.  So changing one caption encodes one caption anew,
another text encoder never meets stale outputs, and runs may share a cache.  The ranks of a run take the next piece of the work
whenever they are free (``sharing``), read what encoders need ahead of them (``reading``), give them as much as the memory holds
(``memory``), and write shards of their own (``encoding``, ``shards``).  ``python -m utils.data.cache`` looks after a cache.
"""

from utils.data.cache.dataset import BuildReport, DatasetCache, EncoderReport, broken_files
from utils.data.cache.keys import input_key, inputs_of

__all__ = ["BuildReport", "DatasetCache", "EncoderReport", "broken_files", "input_key", "inputs_of"]
