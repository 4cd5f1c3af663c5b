"""The report's pictures, as inline SVG."""
