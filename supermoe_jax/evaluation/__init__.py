"""How good a run is: metrics, full ranking, baselines, probes."""
