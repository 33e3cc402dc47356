"""One run from its inputs to its record, or several on one base model."""
