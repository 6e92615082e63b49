"""A Flower app that runs any federated recipe: `server.app` and `client.app`, for `flwr run`."""
