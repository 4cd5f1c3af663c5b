"""Reports on a run while it trains: metrics, traces, utilisation."""
