"""Which backend an operation runs on: what can run, what was asked for, what is right here, what is fastest."""
