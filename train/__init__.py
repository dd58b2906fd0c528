"""The commands of a checkout, ``python -m train.NAME``; each is one of ``msf-fast``'s."""
