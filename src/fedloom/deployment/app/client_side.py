"""The client side of the Flower app: empty. Clients of fedloom run no code from a server."""

from flwr.clientapp import ClientApp

client = ClientApp()
