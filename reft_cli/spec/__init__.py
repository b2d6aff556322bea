"""The YAML spec: its schema, and the loader that reads, layers and checks it."""
