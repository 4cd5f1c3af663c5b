"""Offers the functions of the `supermoe` command in Python, for notebooks and pipelines.

`import supermoe_jax as sm` gives the whole API: `sm.load_config`, `sm.prepare`, `sm.train`, `sm.Run` and so on. No
function prints. Messages go to the logger "supermoe_jax", and `progress=True` shows bars.
"""
