"""The engines behind the adapter: gRPC streams, their pool and their health."""
