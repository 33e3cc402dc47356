"""A finished adapter in use: opened, continued text, merged."""
