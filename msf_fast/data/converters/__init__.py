"""The converters, one module per benchmark. Each declares its options and a ``CONVERTER``; a module that is added here
is found by ``msf_fast.data.conversion.converters``."""
