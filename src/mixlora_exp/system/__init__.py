"""The machine beneath: devices, signals, files that survive a power loss, locks, the console."""
