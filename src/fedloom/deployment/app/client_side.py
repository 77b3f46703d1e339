"""A client's side of the Flower app: none. Clients of fedloom run nothing that a server brings."""

from flwr.clientapp import ClientApp

client = ClientApp()
