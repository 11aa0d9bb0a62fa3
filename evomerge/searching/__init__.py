"""The search: sampler, ledger, loop, verdict."""
