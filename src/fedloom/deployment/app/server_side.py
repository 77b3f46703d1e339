"""The server's side of the Flower app: part of the installed package, nothing else is brought along."""

from fedloom.deployment.serverapp import app

server = app
