"""A minimal federated learning app for tests that really learns."""
