"""Pages for people: a run's report and a seesaw study's, each one HTML file that needs nothing beside it."""

from supermoe_jax.report.page import write_report

__all__ = ["write_report"]
