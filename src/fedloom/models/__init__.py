"""Backbones and what is trained on them."""

import logging

from fedloom.models.lean_imports import lean
from fedloom.models.peft_backends import BITSANDBYTES, without

# Optional libraries that peft imports where they are installed; what they could not load and we do not
# use tells a user nothing.
for _name in ("torchao", "torch.utils._pytree", "bitsandbytes"):
    logging.getLogger(_name).setLevel(logging.ERROR)

with lean(), without(BITSANDBYTES):
    import peft as peft  # here, so that it is imported so, whichever file here needs it first
