"""`python -m supermoe_jax` does what `supermoe` does."""

from supermoe_jax.cli import main

if __name__ == "__main__":
  raise SystemExit(main())
