"""The machine: devices, signals, durable files, locks, untrusted input, the console."""
