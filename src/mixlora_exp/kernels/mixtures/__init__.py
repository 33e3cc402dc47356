"""Mixtures of LoRA experts per linear layer, a file each: every file here is imported with the
package and registers itself."""
