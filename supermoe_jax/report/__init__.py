"""Reports for people: writes the page of a run and the page of a seesaw study, each as one self-contained HTML file."""

from supermoe_jax.report.page import write_report

__all__ = ["write_report"]
