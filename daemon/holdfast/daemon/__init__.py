"""One daemon per node: `core` decides, `shell` carries out, `keeper` holds memory over the worker's death."""
