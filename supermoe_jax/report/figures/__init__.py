"""Draws the reports' figures as inline SVG."""
