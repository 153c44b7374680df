"""Shipped recipes (YAML), found by name: ``llava-kit train quickstart``."""
