"""The coordinator: who does what. It prepares and publishes a run, leases partitions, judges shards and assembles them.

This process never imports torch; heavy work runs in child processes (`forge.jobs`).
"""
