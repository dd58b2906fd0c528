"""The commands: ``python -m train.NAME``, run from a checkout."""
