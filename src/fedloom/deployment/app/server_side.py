"""The server side of the Flower app: code of the installed package only."""

from fedloom.deployment.serverapp import app

server = app
