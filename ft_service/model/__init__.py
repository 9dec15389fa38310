"""Base models and adapters. The only user of peft and bitsandbytes in training; knows nothing of parallelism."""

import logging

# At its import bitsandbytes recommends, in every process, a package that it would then fetch from a hub.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
