"""The web page of a run: read-only, on loopback unless asked otherwise, and never in the way of the run."""
