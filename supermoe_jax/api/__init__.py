"""The Python API: what the `supermoe` command does, for notebooks and pipelines.

`import supermoe_jax as sm` gives all of it: `sm.load_config`, `sm.prepare`, `sm.train`, `sm.Run` and so on. Nothing
prints. Messages go to the logger "supermoe_jax", and `progress=True` shows bars.
"""
