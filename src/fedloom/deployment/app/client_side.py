"""A client's side of the Flower app: part of the installed package, nothing else is brought along."""

from fedloom.deployment.clientapp import app

client = app
