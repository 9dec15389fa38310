"""Base models and adapters. The only user of peft and bitsandbytes in training; knows nothing about parallelism."""

import logging

# The only side effect of an import in this package, because bitsandbytes logs when it is imported: every process would
# recommend a package that bitsandbytes then downloads from the hub.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
