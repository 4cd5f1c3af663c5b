"""What a run reports while it trains: metrics, traces, utilisation."""
