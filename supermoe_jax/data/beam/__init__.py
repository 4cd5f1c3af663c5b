"""Prepares datasets on Apache Beam, from logs that one machine cannot hold."""
