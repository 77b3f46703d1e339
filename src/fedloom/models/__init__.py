"""Backbones and what is trained on them."""

import logging

# Optional libraries that peft imports where they are installed; what they could not load and we do not
# use tells a user nothing.
for _name in ("torchao", "torch.utils._pytree", "bitsandbytes"):
    logging.getLogger(_name).setLevel(logging.ERROR)
