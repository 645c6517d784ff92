"""`python -m metarec_jax.cli`."""

from metarec_jax.cli import main

main()
