"""What Flower starts on a client for each message: it hands the message to the worker, and no more.

Nothing heavy is imported here: the worker (``worker.py``) has the model loaded.
"""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedloom.deployment.calling import ask_worker
from fedloom.engines.records import from_records, to_records

app = ClientApp()


@app.query()
def carry(message: Message, context: Context) -> Message:
    """Return the worker's reply to a message."""
    home = Path(str(context.node_config["fedloom-home"]))
    reply = ask_worker(home, from_records(message.content))
    return Message(to_records(reply), reply_to=message)
