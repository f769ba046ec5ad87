"""The measured claims: ``python -m cmlib bench`` prints every table in one run."""
