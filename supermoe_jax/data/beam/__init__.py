"""Preparation on Apache Beam, for logs that one machine cannot hold."""
